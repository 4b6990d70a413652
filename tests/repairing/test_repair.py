"""Checkpoints with a fault are mended, and nothing else of them changes."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from kit import tampering as T  # noqa: N812
from kit.command import run_here
from kit.files import FIXTURES, read_files, read_json, read_tensors
from kit.verified import EXPERT, LAYER, NVFP4, UP, converted

import moe_ckpt
from moe_ckpt.errors import UncheckedError
from moe_ckpt.repairing import make_repair
from moe_ckpt.source.items import numbers
from moe_ckpt.verify import verify

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate((E2M1, -E2M1))
UP_SCALE = f"{UP}.weight_scale_2"
DENSE = FIXTURES / "deepseek_v3" / "modelopt-nvfp4"


def scaled(folder, name, by):
    """Multiply a scale."""
    (value,) = struct.unpack("<f", T.tensors_of(T.shard_of(folder, name))[name].data)
    T.poke(folder, name, T.float32(value * by))


def decoded(folder, module, *, inverse=False):
    """The weights of an NVFP4 matrix, from the definitions."""
    tensors = read_tensors(folder)
    codes = tensors.get(f"{module}.weight") or tensors[f"{module}.weight_packed"]
    raw = np.frombuffer(codes.data, np.uint8).reshape(codes.shape)
    values = E2M1[np.stack((raw & 15, raw >> 4), -1).reshape(codes.shape[0], -1)]
    scale = tensors[f"{module}.weight_scale"]
    blocks = numbers(np.frombuffer(scale.data, np.uint8), "F8_E4M3").reshape(scale.shape)
    name = "weight_global_scale" if inverse else "weight_scale_2"
    (whole,) = np.frombuffer(tensors[f"{module}.{name}"].data, np.float32)
    blocks = blocks / whole if inverse else blocks * whole
    return values * blocks.repeat(16, 1)


def mended(tmp_path, folder, *options):
    """The repaired checkpoint, in which nothing is wrong."""
    out = tmp_path / "out"
    before = read_files(folder)
    done = run_here("repair", folder, out, *options)
    assert done.returncode == 0, done.stderr
    assert read_files(folder) == before
    assert not verify(out).of_grade("error")
    return out


def changed(before, after):
    """The names of tensors that are not what they were."""
    one, other = read_tensors(before), read_tensors(after)
    assert one.keys() <= other.keys()
    return {name for name in other if one.get(name) != other[name]}


@pytest.mark.parametrize("by", [0.5, 0.125])
def test_unequal_scales_are_made_equal_and_no_weight_moves(tmp_path, by):
    folder = T.copy(NVFP4, tmp_path)
    scaled(folder, UP_SCALE, by)
    scales = np.frombuffer(read_tensors(folder)[f"{UP}.weight_scale"].data, np.uint8)
    assert scales.min() >= 48  # or e4m3 would have no room below
    out = mended(tmp_path, folder)
    assert changed(folder, out) == {UP_SCALE, f"{UP}.weight_scale"}
    assert np.array_equal(decoded(out, UP), decoded(folder, UP))
    assert verify(out, source=folder, sample=None).is_clean
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_unequal_scales_that_need_rounding_are_counted(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    scaled(folder, UP_SCALE, 0.7)
    done = run_here("repair", folder, tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    (mend,) = document["mends"]
    assert (mend["kind"], mend["where"]) == ("rounded", UP_SCALE)
    assert 0 < document["result"]["rounded_blocks"] <= mend["blocks"]
    assert changed(folder, tmp_path / "out") <= {UP_SCALE, f"{UP}.weight_scale", f"{UP}.weight"}
    was, now = decoded(folder, UP), decoded(tmp_path / "out", UP)
    assert np.abs(now - was).max() <= np.abs(was).max() / 15
    assert (np.abs(now - was) <= np.abs(was) / 15 + 1e-12).all()
    assert verify(tmp_path / "out", source=folder, sample=None).is_clean


def test_pairs_of_another_tool_that_differ_in_nearly_every_expert(tmp_path):
    """As llm-compressor made them: no two scales of gate and up are equal."""
    folder = FIXTURES / "qwen3_moe" / "llm-compressor-nvfp4a16"
    assert len(make_repair(folder).mends) > 10
    out = mended(tmp_path, folder)
    module = "model.layers.0.mlp.experts.0"
    for name in ("gate_proj", "up_proj", "down_proj"):
        was, now = (decoded(f, f"{module}.{name}", inverse=True) for f in (folder, out))
        assert (np.abs(now - was) <= np.abs(was) / 15 + 1e-12).all()
    assert {p.name for p in out.iterdir()} - {".moe-ckpt"} == {p.name for p in folder.iterdir()}


def test_q_k_and_v_get_one_scale_in_the_spelling_of_reciprocals(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    options = {"format": "nvfp4", "quantize": "linear", "dialect": "compressed-tensors"}
    moe_ckpt.convert(source, tmp_path / "in", device="cpu", **options)
    attention = "model.layers.0.self_attn"
    scaled(tmp_path / "in", f"{attention}.k_proj.weight_global_scale", 0.25)
    assert verify(tmp_path / "in").of_grade("error")
    out = mended(tmp_path, tmp_path / "in")
    for name in ("q_proj", "k_proj", "v_proj"):
        was, now = (decoded(f, f"{attention}.{name}", inverse=True) for f in (tmp_path / "in", out))
        assert np.array_equal(was, now)
    endings = (".weight_global_scale", ".weight_scale")
    assert changed(tmp_path / "in", out) == {
        f"{attention}.{name}{ending}" for name in ("q_proj", "v_proj") for ending in endings
    }


def test_convert_gives_them_one_scale_too_and_the_source_agrees(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    scaled(folder, UP_SCALE, 0.7)
    scaled(folder, "model.layers.0.self_attn.k_proj.weight_scale_2", 0.7)
    done = run_here("convert", folder, tmp_path / "out", "--format", "nvfp4")
    assert done.returncode == 0, done.stderr
    assert "were rounded a second time" in done.stderr
    assert verify(tmp_path / "out", source=folder, sample=None).is_clean


def test_missing_activation_scales_are_the_largest_of_the_layer(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    name = f"{EXPERT}.gate_proj.input_scale"
    before = read_tensors(folder)[name]
    T.delete(folder, name)
    out = mended(tmp_path, folder)
    assert read_tensors(out)[name] == before  # it is the same for all
    assert changed(folder, out) == {name}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_activation_scales_that_are_no_numbers_are_the_largest_of_the_layer(tmp_path, value):
    folder = T.copy(NVFP4, tmp_path)
    name = f"{EXPERT}.down_proj.input_scale"
    T.poke(folder, name, T.float32(value))
    out = mended(tmp_path, folder)
    assert read_tensors(out) == read_tensors(NVFP4)


def without_inputs(tmp_path):
    """A copy whose experts have no activation scales at all."""
    folder = T.copy(NVFP4, tmp_path)
    names = [n for n in read_tensors(folder) if ".experts." in n and n.endswith("input_scale")]
    T.delete(folder, *names)
    return folder, names


def test_where_a_layer_has_none_they_are_those_of_statistics(tmp_path):
    folder, names = without_inputs(tmp_path)
    done = run_here("repair", folder, tmp_path / "out")
    assert done.returncode == 3
    assert "give --stats FILE" in done.stderr
    assert not (tmp_path / "out").exists()
    out = mended(tmp_path, folder, "--stats", FIXTURES / "qwen3_moe" / "stats.json")
    assert changed(folder, out) == set(names)
    found, wanted = read_tensors(out), read_tensors(NVFP4)
    assert {n: found[n] for n in names} == {n: wanted[n] for n in names}


def test_reciprocals_are_inverted(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    path = folder / "model.safetensors"
    tensors = T.tensors_of(path)
    for name, tensor in tensors.items():
        if name.endswith(("weight_scale_2", "input_scale")):
            (value,) = struct.unpack("<f", tensor.data)
            tensors[name] = T.Tensor(tensor.dtype, tensor.shape, T.float32(1 / value))
    T.write_shard(path, tensors)
    out = mended(tmp_path, folder)
    found, wanted = read_tensors(out), read_tensors(NVFP4)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith(("weight_scale_2", "input_scale")):
            one, other = (struct.unpack("<f", t.data)[0] for t in (found[name], tensor))
            assert abs(one / other - 1) < 1e-6, name
        else:
            assert found[name] == tensor


def test_one_reciprocal_of_a_pair_that_differs_then_is_not_mended(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    (value,) = struct.unpack("<f", read_tensors(folder)[UP_SCALE].data)
    T.poke(folder, UP_SCALE, T.float32(1 / (value * 0.7)))
    done = run_here("repair", folder, tmp_path / "out")
    assert done.returncode == 3
    assert "not stored alike" in done.stderr


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_powers_of_two_are_called_what_runtimes_hold(tmp_path, name):
    if name == "mxfp8":
        folder = T.copy(FIXTURES / "qwen3_moe_wide" / "modelopt-mxfp8", tmp_path)
    else:
        folder = converted(tmp_path, "qwen3_moe_wide", "mxfp4")
    wanted = read_tensors(folder)
    for path in folder.glob("*.safetensors"):
        tensors = T.tensors_of(path)
        for tensor, held in tensors.items():
            if tensor.endswith("weight_scale"):
                tensors[tensor] = T.Tensor("F8_E8M0", held.shape, held.data)
        T.write_shard(path, tensors)
    shutil.rmtree(folder / ".moe-ckpt", ignore_errors=True)
    assert read_tensors(mended(tmp_path, folder)) == wanted


def test_the_configuration_is_written_from_the_tensors(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    T.quantization(folder, lambda said: T.listed(said).clear())
    (folder / "notes.txt").write_text("kept")
    out = mended(tmp_path, folder)
    assert changed(folder, out) == set()
    assert (out / "notes.txt").read_text() == "kept"
    assert "lm_head" in T.listed(read_json(out / "config.json")["quantization_config"])
    assert "lm_head" in T.listed(read_json(out / "hf_quant_config.json")["quantization"])


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3/modelopt-nvfp4",
        "gpt_oss/modelopt-nvfp4",
        "llama4/modelopt-nvfp4",
        "mixtral/modelopt-nvfp4-experts",
        "qwen2_moe/modelopt-fp8",
        "qwen3_moe_wide/modelopt-mxfp8",
    ],
)
def test_what_no_file_says_is_read_off_the_tensors(tmp_path, name):
    folder = T.copy(FIXTURES / name, tmp_path)
    T.edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    (folder / "hf_quant_config.json").unlink()
    assert changed(folder, mended(tmp_path, folder)) == set()


def test_a_form_that_no_dialect_writes_is_not_described(tmp_path):
    folder = T.copy(FIXTURES / "qwen3_moe_wide" / "modelopt-fp8-block", tmp_path)
    T.quantization(folder, lambda said: T.listed(said).clear())
    done = run_here("repair", folder, tmp_path / "out")
    assert done.returncode == 3
    assert "no dialect has these formats" in done.stderr


@pytest.mark.parametrize("text", ["{", '{"quantization": 3}'])
def test_a_damaged_file_beside_is_written_anew(tmp_path, text):
    folder = T.copy(NVFP4, tmp_path)
    (folder / "hf_quant_config.json").write_text(text)
    out = mended(tmp_path, folder)
    assert read_json(out / "hf_quant_config.json")["quantization"]["quant_algo"] == "NVFP4"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A checkpoint of several shards, with a pair torn between two of them."""
    folder = tmp_path_factory.mktemp("several") / "in"
    stats = [FIXTURES / "qwen3_moe" / "stats.json"]
    source = FIXTURES / "qwen3_moe" / "source"
    moe_ckpt.convert(source, folder, format="nvfp4", stats=stats, device="cpu",
                     max_shard_size=60_000)  # fmt: skip
    shutil.rmtree(folder / ".moe-ckpt")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    there, here = T.tensors_of(last), T.tensors_of(first)
    up = next(n for n in here if n.endswith("up_proj.weight")).removesuffix(".weight")
    for name in [n for n in here if n.startswith(f"{up}.")]:
        there[name] = here.pop(name)
    T.write_shard(first, here)
    T.write_shard(last, there)
    weight_map = {n: p.name for p in sorted(folder.glob("*.safetensors")) for n in T.tensors_of(p)}
    T.edit_json(folder / T.INDEX, lambda index: index.update(weight_map=weight_map))
    assert verify(folder).is_clean
    scaled(folder, f"{up}.weight_scale_2", 0.5)
    return folder, up


def test_a_pair_in_two_shards_comes_together(tmp_path, several):
    folder, up = several
    out = mended(tmp_path, folder)
    assert np.array_equal(decoded(out, up), decoded(folder, up))
    assert changed(folder, out) == {f"{up}.weight_scale_2", f"{up}.weight_scale"}
    assert {p.name for p in out.glob("*.safetensors")} == {
        p.name for p in folder.glob("*.safetensors")
    }


INDICES = {
    "stale total": lambda index: index["metadata"].update(total_size=1),
    "no metadata": lambda index: index.pop("metadata"),
    "wrong shard": lambda index: index["weight_map"].update(
        dict.fromkeys(list(index["weight_map"])[:3], max(index["weight_map"].values()))
    ),
    "a name too few": lambda index: index["weight_map"].pop(next(iter(index["weight_map"]))),
}


@pytest.mark.parametrize("fault", [*INDICES, "none"])
def test_the_index_is_written_from_the_shards(tmp_path, several, fault):
    folder = T.copy(mended(tmp_path, several[0]), tmp_path)
    shutil.rmtree(folder / ".moe-ckpt")
    shutil.rmtree(tmp_path / "out")
    wanted = read_json(folder / T.INDEX)
    if fault == "none":
        (folder / T.INDEX).unlink()
    else:
        T.edit_json(folder / T.INDEX, INDICES[fault])
    (mend,) = make_repair(folder).mends
    assert mend.kind == "index"
    out = mended(tmp_path, folder)
    assert read_json(out / T.INDEX) == wanted
    assert changed(folder, out) == set()


KILLED = """
import os, signal, sys
import moe_ckpt
def stop(_nbytes, shard):
    if shard is not None:
        os.kill(os.getpid(), signal.SIGKILL)
moe_ckpt.repair(sys.argv[1], sys.argv[2], progress=stop)
"""


def test_a_repair_that_was_killed_goes_on(tmp_path, several):
    folder, _ = several
    wanted = read_files(mended(tmp_path, folder))
    shutil.rmtree(tmp_path / "out")

    done = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / "out"], check=False)
    assert done.returncode == -signal.SIGKILL
    finished = list((tmp_path / "out").glob("*.safetensors"))
    assert finished
    assert not (tmp_path / "out" / "config.json").exists()
    result = moe_ckpt.repair(folder, tmp_path / "out")
    assert result.resumed >= len(finished)
    assert read_files(tmp_path / "out") == wanted
    assert moe_ckpt.repair(folder, tmp_path / "out").was_complete
    done = run_here("convert", folder, tmp_path / "out")
    assert done.returncode == 4


SOUND = [
    "qwen3_moe/modelopt-nvfp4",
    "qwen3_moe/modelopt-nvfp4-experts",
    "qwen3_moe/modelopt-nvfp4-w4a16",
    "qwen3_moe/modelopt-fp8",
    "qwen3_moe/modelopt-fp8-channel",
    "qwen3_moe_wide/modelopt-fp8-block",
    "qwen3_moe_wide/modelopt-mxfp8",
    "deepseek_v3/modelopt-nvfp4",
    "deepseek_v3/modelopt-fp8",
    "mixtral/modelopt-nvfp4",
    "qwen2_moe/modelopt-nvfp4",
    "gpt_oss/modelopt-nvfp4",
    "llama4/modelopt-fp8",
]


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_written_where_nothing_is_to_be_mended(tmp_path, name):
    errors = verify(FIXTURES / name).of_grade("error")
    done = run_here("repair", FIXTURES / name, tmp_path / "out")
    assert done.returncode == (3 if errors else 0), done.stderr
    assert ("nothing to mend" in done.stderr) == (not errors)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_mended_is_said_before_anything_is_written(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    scaled(folder, UP_SCALE, 0.5)
    T.poke(folder, f"{EXPERT}.down_proj.weight_scale", b"\x7f")
    done = run_here("repair", folder, tmp_path / "out")
    assert done.returncode == 3
    assert f"{EXPERT}.down_proj.weight_scale" in done.stderr
    assert "--partial mends the rest" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_here("repair", folder, tmp_path / "out", "--partial", "-q")
    assert done.returncode == 6
    assert "is mended in part; this stays wrong" in done.stderr
    wrong = verify(tmp_path / "out").of_grade("error")
    assert {finding.where for finding in wrong} == {f"{EXPERT}.down_proj.weight_scale"}


def test_a_shard_that_is_cut_off_is_not_mended(tmp_path, several):
    folder = T.copy(several[0], tmp_path)
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    done = run_here("repair", folder, tmp_path / "out")
    assert done.returncode == 3
    assert path.name in done.stderr


def test_a_dry_run_says_what_would_be_mended_and_writes_nothing(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    scaled(folder, UP_SCALE, 0.5)
    T.delete(folder, f"{LAYER}.0.up_proj.input_scale")
    done = run_here("repair", folder, tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert {(m["kind"], m["where"]) for m in document["mends"]} == {
        ("exact", UP_SCALE),
        ("input_scale", f"{LAYER}.0.up_proj.input_scale"),
    }
    assert document["result"] is None
    assert not (tmp_path / "out").exists()


def test_ways_to_quantize_that_are_not_read_are_not_mended(tmp_path):
    folder = T.copy(NVFP4, tmp_path)
    T.quantization(folder, lambda said: said.update(sparsity_config={"format": "sparse"}))
    with pytest.raises(UncheckedError, match="sparse"):
        moe_ckpt.repair(folder, tmp_path / "out")


def test_mixtral_pairs_are_w1_and_w3(tmp_path):
    folder = T.copy(FIXTURES / "mixtral" / "modelopt-nvfp4", tmp_path)
    name = next(n for n in read_tensors(folder) if n.endswith("1.w3.weight_scale_2"))
    module = name.removesuffix(".weight_scale_2")
    scaled(folder, name, 2.0)
    out = mended(tmp_path, folder)
    for of in (module, module.replace("w3", "w1")):
        was, now = decoded(folder, of), decoded(out, of)
        assert np.array_equal(was, now)
