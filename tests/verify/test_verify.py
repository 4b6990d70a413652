"""What a verification of a checkpoint alone finds in its tensors, and nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from kit.command import run_cli
from kit.files import FIXTURES, write_headers
from kit.stored_as import ENCODINGS, MXFP4, experts, fused, mxfp4, save
from kit.tampering import (
    INDEX,
    add,
    change,
    copy,
    delete,
    edit_json,
    float32,
    poke,
    shard_of,
    tensors_of,
    write_shard,
)
from kit.whole_plans import CASES

import moe_ckpt
from moe_ckpt.dialects import DIALECTS
from moe_ckpt.errors import CheckpointError, InputError, UsageError
from moe_ckpt.formats import find_format
from moe_ckpt.verify import Findings, check_parts, verify
from moe_ckpt.verify.subject import open_subject

GOLDEN = sorted(FIXTURES.glob("*/modelopt-*"))
NVFP4 = FIXTURES / "qwen3_moe" / "modelopt-nvfp4"
FP8 = FIXTURES / "qwen3_moe" / "modelopt-fp8"
MXFP8 = FIXTURES / "qwen3_moe_wide" / "modelopt-mxfp8"
STACKED = FIXTURES / "gpt_oss" / "modelopt-nvfp4"
LLM_COMPRESSOR = FIXTURES / "qwen3_moe" / "llm-compressor-nvfp4a16"
LAYER = "model.layers.0.mlp.experts"
EXPERT = f"{LAYER}.3"
UP = f"{EXPERT}.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"
KV = ("k_proj", "v_proj")
NAN32, INF32 = float32(math.nan), float32(math.inf)


def converted(tmp_path, model, name, **options):
    """Our conversion of a fixture."""
    stats = [FIXTURES / model / "stats.json"] if find_format(name).input_scale else []
    if options.get("kv_cache") == "fp8":
        stats.append(with_outputs(tmp_path, model))
    out = tmp_path / f"{model}-{name}"
    source = FIXTURES / model / options.pop("form", "source")
    moe_ckpt.convert(source, out, format=name, stats=stats, device="cpu", **options)
    return out


def with_outputs(folder, model):
    """Statistics of what k_proj and v_proj put out."""
    text = (FIXTURES / model / "source" / "config.json").read_text()
    attention = [
        f"model.layers.{layer}.self_attn" for layer in range(json.loads(text)["num_hidden_layers"])
    ]
    modules = {f"{a}.{p}": {"input_amax": 8, "output_amax": 9} for a in attention for p in KV}
    file = folder / "outputs.json"
    file.write_text(json.dumps({"schema": "moe-ckpt/stats", "version": 1, "modules": modules}))
    return file


def one(findings, where):
    """The finding about a tensor, module or file."""
    found = [finding for finding in findings.found if finding.where == where]
    assert found, [finding[:3] for finding in findings.found]
    return found[0]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_exports_of_modelopt_are_clean(folder):
    findings = verify(folder)
    assert findings.found == []
    assert findings.counts["scales"] > 0
    assert findings.skipped.keys() == {"source"}


@pytest.mark.parametrize(
    ("model", "row", "quantize", "form"),
    CASES,
    ids=[f"{m}-{row.name}-{q}-{e}" for m, row, q, e in CASES],
)
def test_conversions_are_clean_in_every_dialect(tmp_path, model, row, quantize, form):
    made = 0
    for dialect in DIALECTS:
        options = {"dialect": dialect.name, "quantize": quantize, "experts": form}
        try:
            out = converted(tmp_path / dialect.name, model, row.name, **options)
        except (InputError, UsageError):
            continue
        made += 1
        findings = verify(out)
        assert findings.found == [], dialect.name
        assert row.name == "bf16" or findings.counts[f"matrices in {row.name}"]
    assert made


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_conversions_with_a_kv_cache_in_many_shards_are_clean(tmp_path, model, dialect):
    options = {"kv_cache": "fp8", "max_shard_size": "60KB", "form": "hub", "dialect": dialect}
    findings = verify(converted(tmp_path, model, "nvfp4", **options))
    assert findings.found == []
    assert findings.counts["shards"] > 1
    assert findings.counts["digests"] > findings.counts["shards"]


def test_a_mix_of_formats_is_clean(tmp_path):
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "{}"\nformat = "{}"\n'
    recipe.write_text(
        rule.format("model.layers.0.*", "keep")
        + rule.format("*.experts.*", "nvfp4")
        + rule.format("*.self_attn.*", "fp8-tensor")
    )
    stats = [FIXTURES / "qwen3_moe" / "stats.json"]
    source = FIXTURES / "qwen3_moe" / "source"
    moe_ckpt.convert(source, tmp_path / "out", recipe=recipe, stats=stats, device="cpu")
    findings = verify(tmp_path / "out")
    assert findings.found == []
    assert findings.counts["matrices in nvfp4"]
    assert findings.counts["matrices in fp8-tensor"]


def stored(folder, name):
    """Experts in an encoding that others write, and a router, of whatever numbers."""
    encode, options, said, _ = ENCODINGS[name]
    shared = {"shared_amax": True} if "nvfp4" in name else {}
    tensors, _ = experts(encode, 4, 128, 256, **shared, **options)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(4, 256, dtype=torch.bfloat16)
    key = "modules_to_not_convert" if said["quant_method"] in ("fp8", "mxfp8") else "ignore"
    said = said | {key: ["lm_head", "model.layers.0.mlp.gate"]}
    return save(folder, tensors, said, count=4, i=128, h=256)


@pytest.mark.parametrize(
    "name",
    [
        *("fp8-block-F32", "fp8-block-BF16", "fp8-block-ct", "fp8-tensor-1d", "fp8-channel-bf16"),
        *("mxfp8-inv", "mxfp8-ct", "nvfp4-modelopt-1d", "nvfp4-ct-a16", "mxfp4-ct", "int8"),
        *("int4-g32", "int4-g64-f16", "int4-g128-f32"),
    ],
)
def test_what_others_write_is_clean(tmp_path, name):
    findings = verify(stored(tmp_path / "in", name))
    assert findings.found == []
    assert findings.counts["scales"] >= 12


def test_scales_of_rows_without_a_second_dimension_are_found(tmp_path):
    found = one(verify(stored(tmp_path / "in", "int8-1d")), f"{LAYER}.0.up_proj.weight_scale")
    assert found.problem == "has shape [128]; compressed-tensors has [128, 1]"


def test_experts_of_gpt_oss_as_they_are_released_are_clean(tmp_path):
    tensors, _ = fused(mxfp4, 4, 128, 256, interleaved=True, blocks=True)
    for leaf, size in (("gate_up_proj_bias", 256), ("down_proj_bias", 256)):
        tensors[f"{LAYER}.{leaf}"] = torch.zeros(4, size, dtype=torch.bfloat16)
    folder = save(tmp_path / "in", tensors, MXFP4, count=4, i=128, h=256, model_type="gpt_oss")
    findings = verify(folder)
    assert findings.found == []
    assert all(runtime.loads for runtime in findings.runtimes)
    poke(folder, f"{LAYER}.down_proj_scales", b"\xff", 300)
    assert "scale is nan at [0, 75, 0]" in one(verify(folder), f"{LAYER}.down_proj_scales").problem
    delete(folder, f"{LAYER}.down_proj_scales")
    assert "is missing" in one(verify(folder), f"{LAYER}.down_proj_scales").problem


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "gpt_oss", "llama4"])
def test_sources_are_clean(model):
    assert verify(FIXTURES / model / "source").found == []


def test_scales_of_llm_compressor_differ_between_gate_and_up():
    findings = verify(LLM_COMPRESSOR)
    assert {finding.part for finding in findings.found} == {"scales"}
    found = one(findings, f"{LAYER}.0.up_proj.weight_global_scale")
    assert f"{LAYER}.0.gate_proj.weight_global_scale" in found.problem
    assert "vLLM uses gate's for both" in found.effect
    assert len(findings.found) == 14  # of 16 experts two happen to be equal
    refused = {runtime.name: runtime.why_not for runtime in findings.runtimes}
    assert "differ between gate and up" in refused["SGLang"]


# What is changed in ModelOpt's NVFP4 export, where that is found, in which part, and what is said.
NVFP4_TAMPERED = {
    "codes deleted": (
        lambda f: delete(f, f"{UP}.weight"),
        f"{UP}.weight",
        "structure",
        "is missing; NVFP4 of ModelOpt needs it",
    ),
    "block scale deleted": (
        lambda f: delete(f, f"{UP}.weight_scale"),
        f"{UP}.weight_scale",
        "structure",
        "is missing",
    ),
    "global scale deleted": (
        lambda f: delete(f, f"{UP}.weight_scale_2"),
        f"{UP}.weight_scale_2",
        "structure",
        "is missing",
    ),
    "input scale deleted": (
        lambda f: delete(f, f"{UP}.input_scale"),
        f"{UP}.input_scale",
        "structure",
        "the other experts have one",
    ),
    "input scale of a linear layer deleted": (
        lambda f: delete(f, f"{QUERY}.input_scale"),
        f"{QUERY}.input_scale",
        "structure",
        "static scale",
    ),
    "all input scales of a layer deleted": (
        lambda f: delete(
            f,
            *(
                f"{LAYER}.{e}.{p}_proj.input_scale"
                for e in range(8)
                for p in ("gate", "up", "down")
            ),
        ),
        f"{LAYER}.0.down_proj.input_scale",
        "structure",
        "23 more of the layer lack it",
    ),
    "an expert deleted": (
        lambda f: delete(f, *(n for n in tensors_of(min(f.glob("*.saf*"))) if f"{EXPERT}." in n)),
        UP,
        "structure",
        "is missing; the layer has 8 experts",
    ),
    "the last expert deleted": (
        lambda f: delete(f, *(n for n in tensors_of(min(f.glob("*.saf*"))) if f"{LAYER}.7." in n)),
        f"{LAYER}.7.gate_proj",
        "structure",
        "is missing",
    ),
    "an expert too many": (
        lambda f: [
            add(f, name.replace(".7.", ".8."), t.dtype, t.shape, t.data)
            for name, t in tensors_of(f / "model.safetensors").items()
            if f"{LAYER}.7." in name
        ],
        f"{LAYER}.8",
        "structure",
        "one expert too many; config.json says num_local_experts=8",
    ),
    "dtype of block scale": (
        lambda f: change(f, f"{UP}.weight_scale", dtype="U8"),
        f"{UP}.weight_scale",
        "structure",
        "is U8; expected F8_E4M3",
    ),
    "dtype of global scale": (
        lambda f: change(f, f"{UP}.weight_scale_2", dtype="BF16", data=b"\x80\x3f"),
        f"{UP}.weight_scale_2",
        "structure",
        "is BF16; expected F32",
    ),
    "dtype of input scale": (
        lambda f: change(f, f"{UP}.input_scale", dtype="BF16", data=b"\x80\x3f"),
        f"{UP}.input_scale",
        "structure",
        "is BF16",
    ),
    "dtype of codes": (
        lambda f: change(f, f"{UP}.weight", dtype="I8"),
        f"{UP}.weight",
        "structure",
        "is I8; expected U8",
    ),
    "shape of block scale": (
        lambda f: change(f, f"{UP}.weight_scale", shape=(24, 8)),
        f"{UP}.weight_scale",
        "structure",
        "has shape [24, 8]; expected [48, 4]",
    ),
    "shape of global scale": (
        lambda f: change(f, f"{UP}.weight_scale_2", shape=(2,), data=bytes(8)),
        f"{UP}.weight_scale_2",
        "structure",
        "has shape [2]",
    ),
    "rank of global scale": (
        lambda f: change(f, f"{UP}.weight_scale_2", shape=(1,)),
        f"{UP}.weight_scale_2",
        "structure",
        "of 0 dimensions",
    ),
    "shape of input scale": (
        lambda f: change(f, f"{UP}.input_scale", shape=(2,), data=bytes(8)),
        f"{UP}.input_scale",
        "structure",
        "expected one number",
    ),
    "a matrix of another shape": (
        lambda f: [
            change(f, f"{UP}.weight", shape=(24, 64)),
            change(f, f"{UP}.weight_scale", shape=(24, 8)),
        ],
        UP,
        "structure",
        "the other experts have [48, 64]",
    ),
    "a scale of another format": (
        lambda f: add(f, f"{UP}.weight_scale_inv", "F32", (), float32(1)),
        f"{UP}.weight_scale_inv",
        "structure",
        "left over",
    ),
    "a scale beside a weight that is not quantized": (
        lambda f: add(f, "lm_head.weight_scale", "F32", (), float32(1)),
        "lm_head.weight_scale",
        "structure",
        "left over: lm_head.weight is BF16",
    ),
    "an input scale beside a weight that is not quantized": (
        lambda f: add(f, "lm_head.input_scale", "F32", (), float32(1)),
        "lm_head.input_scale",
        "structure",
        "left over",
    ),
    "a fused tensor": (
        lambda f: add(f, f"{LAYER}.gate_up_proj", "BF16", (8, 96, 64), bytes(8 * 96 * 64 * 2)),
        f"{LAYER}.gate_up_proj",
        "structure",
        "stands beside the same experts one by one",
    ),
    "codes of another encoding as well": (
        lambda f: add(f, f"{UP}.weight_packed", "U8", (48, 32), bytes(48 * 32)),
        f"{UP}.weight_packed",
        "structure",
        "",
    ),
    "block scale NaN": (
        lambda f: poke(f, f"{UP}.weight_scale", b"\x7f", 5),
        f"{UP}.weight_scale",
        "scales",
        "scale is nan at [1, 1]",
    ),
    "block scale -NaN": (
        lambda f: poke(f, f"{UP}.weight_scale", b"\xff", 191),
        f"{UP}.weight_scale",
        "scales",
        "scale is nan at [47, 3]",
    ),
    "block scales 0": (
        lambda f: poke(f, f"{UP}.weight_scale", b"\x00\x00"),
        f"{UP}.weight_scale",
        "scales",
        "scale is 0.0 at [0, 0], and 1 more",
    ),
    "block scale negative": (
        lambda f: poke(f, f"{UP}.weight_scale", b"\xb8"),
        f"{UP}.weight_scale",
        "scales",
        "scale is -1.0",
    ),
    **{
        f"{name} {value}": (
            lambda f, name=name, value=value: poke(f, f"{UP}.{name}", float32(value)),
            f"{UP}.{name}",
            "scales",
            f"scale is {value}",
        )
        for name in ("weight_scale_2", "input_scale")
        for value in (math.nan, math.inf, 0.0, -1.0)
    },
    "gate unlike up": (
        lambda f: poke(f, f"{UP}.weight_scale_2", float32(0.25)),
        f"{UP}.weight_scale_2",
        "scales",
        f"{EXPERT}.gate_proj.weight_scale_2 is",
    ),
    "q unlike k and v": (
        lambda f: poke(f, "model.layers.0.self_attn.v_proj.weight_scale_2", float32(0.25)),
        "model.layers.0.self_attn.v_proj.weight_scale_2",
        "scales",
        f"is 0.25, and {QUERY}.weight_scale_2 is",
    ),
    "input scale unlike the others": (
        lambda f: poke(f, f"{EXPERT}.down_proj.input_scale", float32(0.25)),
        f"{EXPERT}.down_proj.input_scale",
        "scales",
        "1 of 8 are not",
    ),
    "input scale of v": (
        lambda f: poke(f, "model.layers.0.self_attn.v_proj.input_scale", float32(0.25)),
        "model.layers.0.self_attn.v_proj.input_scale",
        "scales",
        "is 0.25",
    ),
}


@pytest.mark.parametrize("name", NVFP4_TAMPERED)
def test_tampering_with_nvfp4_is_found(tmp_path, name):
    tamper, where, part, text = NVFP4_TAMPERED[name]
    folder = copy(NVFP4, tmp_path)
    tamper(folder)
    found = one(verify(folder), where)
    assert found.part == part
    assert text in found.problem
    assert found.effect


@pytest.mark.parametrize(
    ("base", "name", "data", "text"),
    [
        (FP8, f"{UP}.weight", b"\x7f", "weight is nan at [0, 0]"),
        (FP8, f"{UP}.weight", b"\xff", "weight is nan at [0, 0]"),
        (FP8, f"{UP}.weight_scale", NAN32, "scale is nan"),
        (FP8, f"{UP}.weight_scale", float32(0.5), "is 0.5, and"),
        (FP8, f"{UP}.input_scale", INF32, "scale is inf"),
        (MXFP8, f"{UP}.weight_scale", b"\xff", "scale is nan at [0, 0]"),
        (MXFP8, f"{UP}.weight", b"\x00\x7f\x7f", None),
    ],
)
def test_codes_and_scales_of_8_bits_that_are_no_numbers_are_found(tmp_path, base, name, data, text):
    folder = copy(base, tmp_path)
    poke(folder, name, data)
    assert (text or "weight is nan at [0, 1], and 1 more") in one(verify(folder), name).problem


@pytest.mark.parametrize(
    ("tamper", "where", "text"),
    [
        (
            lambda f: delete(f, f"{LAYER}.gate_up_proj_weight_scale"),
            f"{LAYER}.gate_up_proj_weight_scale",
            "is missing",
        ),
        (
            lambda f: delete(f, f"{LAYER}.down_proj_weight_scale_2"),
            f"{LAYER}.down_proj_weight_scale_2",
            "is missing",
        ),
        (
            lambda f: delete(f, f"{LAYER}.down_proj_input_scale"),
            f"{LAYER}.down_proj_input_scale",
            "is missing",
        ),
        (lambda f: delete(f, f"{LAYER}.down_proj"), f"{LAYER}.down_proj", "is missing"),
        (
            lambda f: change(f, f"{LAYER}.down_proj_weight_scale", shape=(4, 64, 3)),
            f"{LAYER}.down_proj_weight_scale",
            "expected [4, 3, 64]",
        ),
        (
            lambda f: poke(f, f"{LAYER}.down_proj_weight_scale", b"\x7f", 700),
            f"{LAYER}.down_proj_weight_scale",
            "nan at [3, 1, 60]",
        ),
    ],
)
def test_tampering_with_fused_experts_is_found(tmp_path, tamper, where, text):
    folder = copy(STACKED, tmp_path)
    tamper(folder)
    assert text in one(verify(folder), where).problem


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (number_format, suffix)
        for number_format, suffixes in {
            "nvfp4": ("packed", "scale", "global_scale"),
            "int4-g32": ("packed", "scale", "shape"),
            "mxfp4": ("packed", "scale"),
            "fp8-channel": ("", "scale"),
            "int8-channel": ("", "scale"),
        }.items()
        for suffix in suffixes
    ],
)
def test_deleted_tensors_of_compressed_tensors_are_found(tmp_path, name, suffix):
    out = converted(
        tmp_path, "qwen3_moe_wide", name, dialect="compressed-tensors", quantize="experts"
    )
    shutil.rmtree(out / ".moe-ckpt")  # it would say that the file is another
    tensor = f"{UP}.weight{'_' * bool(suffix)}{suffix}"
    delete(out, tensor)
    assert "is missing" in one(verify(out), tensor).problem


def test_a_wrong_shape_of_packed_integers_is_found(tmp_path):
    out = converted(tmp_path, "qwen3_moe_wide", "int4-g32", dialect="compressed-tensors")
    poke(out, f"{UP}.weight_shape", (7).to_bytes(8, "little"))
    assert "is [7, 256]; the codes are those of [128, 256]" in [
        f.problem for f in verify(out).found if f.part == "scales"
    ]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of many shards that has no journal."""
    out = converted(tmp_path_factory.mktemp("sharded"), "qwen3_moe", "nvfp4", max_shard_size="60KB")
    shutil.rmtree(out / ".moe-ckpt")
    assert verify(out).found == []
    return out


def test_a_missing_shard_is_found_once(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    shard.unlink()
    found = verify(folder).found
    assert {finding.where for finding in found} == {shard.name}
    assert "shard is missing" in found[0].problem
    assert "tensors by the index" in found[1].problem


def test_a_damaged_header_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    data = bytearray(shard.read_bytes())
    data[9] ^= 0xFF
    shard.write_bytes(data)
    assert "is not UTF-8" in one(verify(folder), shard.name).problem


def test_a_shard_that_was_cut_short_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    os.truncate(shard, shard.stat().st_size - 1)
    assert "download it again" in one(verify(folder), shard.name).problem


def test_an_extra_shard_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    extra = folder / "model-00099-of-00099.safetensors"
    shutil.copy(min(folder.glob("*.safetensors")), extra)
    assert f"{INDEX} does not name" in one(verify(folder), extra.name).problem


def test_a_stale_single_file_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shutil.copy(NVFP4 / "model.safetensors", folder)
    assert f"{INDEX} does not name" in one(verify(folder), "model.safetensors").problem


@pytest.mark.parametrize(
    ("edit", "where", "text"),
    [
        (lambda i: i["weight_map"].pop(f"{UP}.weight"), f"{UP}.weight", "does not name it"),
        (
            lambda i: i["weight_map"].update({f"{UP}.weight_scale_9": next(iter(shards(i)))}),
            f"{UP}.weight_scale_9",
            "is not in",
        ),
        (lambda i: i["weight_map"].update({f"{UP}.weight": "a/b.bin"}), INDEX, "a/b.bin"),
        (lambda i: i["weight_map"].update({f"{UP}.weight": 3}), INDEX, f'"{UP}.weight"'),
        (lambda i: i.update(weight_map=[]), INDEX, "must be an object"),
        (lambda i: i.pop("metadata"), INDEX, '"metadata"'),
        (lambda i: i["metadata"].update(total_size=1), INDEX, "total_size is 1"),
    ],
)
def test_an_edited_index_is_found(tmp_path, sharded, edit, where, text):
    folder = copy(sharded, tmp_path)
    edit_json(folder / INDEX, edit)
    assert text in one(verify(folder), where).problem


def shards(index):
    return set(index["weight_map"].values())


def test_tensors_in_other_shards_than_the_index_says_are_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    here = shard_of(folder, f"{UP}.weight")
    there = next(path for path in sorted(folder.glob("*.safetensors")) if path != here)
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({f"{UP}.weight": there.name}))
    assert f"is in {here.name}" in one(verify(folder), f"{UP}.weight").problem
    tensors = tensors_of(here)
    write_shard(there, tensors_of(there) | {f"{UP}.weight": tensors[f"{UP}.weight"]})
    assert "is in two shards" in one(verify(folder), f"{UP}.weight").problem


def test_a_missing_index_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    (folder / INDEX).unlink()
    assert "is missing" in one(verify(folder), INDEX).problem


@pytest.mark.parametrize("name", [INDEX, "config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_files_that_are_not_json_are_found(tmp_path, sharded, name, text):
    folder = copy(sharded, tmp_path)
    (folder / name).write_text(text)
    assert one(verify(folder), name).part == "structure"


def test_a_fifo_is_found_and_not_read(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    shard.unlink()
    os.mkfifo(shard)
    assert "not a regular file" in one(verify(folder), shard.name).problem


def test_a_conversion_that_was_not_finished_is_told_of(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4", max_shard_size="60KB")
    (out / "config.json").unlink()
    (out / INDEX).unlink()
    assert "conversion to this folder was not finished" in one(verify(out), "config.json").problem
    assert one(verify(out), INDEX)


def test_bytes_that_changed_after_a_conversion_are_found(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    found = one(verify(out), "model.safetensors")
    assert "has SHA-256" in found.problem
    findings = Findings()
    check_parts(open_subject(out, findings), findings)
    assert findings.is_clean  # sizes are the same, and weights are not read
    (out / "generation_config.json").write_text("{}\n")
    assert "has 3 bytes" in one(verify(out), "generation_config.json").problem
    (out / "generation_config.json").unlink()
    assert "is missing" in one(verify(out), "generation_config.json").problem


def test_a_damaged_journal_is_found(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4")
    (out / ".moe-ckpt" / "journal.jsonl").write_text("no journal\n")
    assert "is damaged" in one(verify(out), ".moe-ckpt/journal.jsonl").problem


def test_files_that_are_not_written_yet_can_be_given(tmp_path):
    """A conversion checks itself before it publishes what makes its output a model."""
    out = converted(tmp_path, "qwen3_moe", "nvfp4", max_shard_size="60KB")
    names = ("config.json", "hf_quant_config.json", INDEX)
    texts = {name: (out / name).read_text() for name in names}
    for name in names:
        (out / name).unlink()
    shutil.rmtree(out / ".moe-ckpt")
    findings = Findings()
    check_parts(open_subject(out, findings, texts), findings)
    assert findings.found == []
    assert findings.counts["matrices in nvfp4"] == 48
    texts["config.json"] = texts["config.json"].replace(
        '"num_local_experts": 8', '"num_local_experts": 9'
    )
    findings = Findings()
    check_parts(open_subject(out, findings, texts), findings)
    assert "is missing; the layer has 9 experts" in one(findings, f"{LAYER}.8.up_proj").problem


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(tmp_path / "nowhere")


def test_a_scale_of_zero_bytes_of_disk_is_found_everywhere(tmp_path):
    """Many findings stay cheap, and are cut short for people only."""
    tensors = {}
    for expert in range(64):
        for projection, n, k in (("gate", 64, 128), ("up", 64, 128), ("down", 128, 64)):
            name = f"{LAYER}.{expert}.{projection}_proj"
            tensors[f"{name}.weight"] = ("F8_E4M3", [n, k])
            tensors[f"{name}.weight_scale"] = ("F32", [n, 1])
    tensors["model.layers.0.mlp.gate.weight"] = ("BF16", [64, 128])
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 64,
        "moe_intermediate_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
                }
            },
        },
    }
    folder = write_headers(tmp_path / "zeros", {"model.safetensors": tensors}, config)
    findings = verify(folder)
    assert len(findings.found) == 64 * 3
    done = run_cli("verify", folder)
    assert done.returncode == 6
    assert "and 172 more" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_reports_and_exits_with_6(tmp_path, as_json):
    folder = copy(NVFP4, tmp_path)
    poke(folder, f"{UP}.weight_scale_2", float32(0.25))
    done = run_cli("verify", folder, *(["--json"] if as_json else []))
    assert done.returncode == 6
    lines = done.stderr.splitlines()
    assert lines[0] == "WRONG     scales: 1 finding"
    assert lines[1].startswith(f"  {UP}.weight_scale_2: is 0.25, and ")
    assert lines[2].startswith("  then      vLLM uses gate's for both")
    assert lines[-1] == f"moe-ckpt: error: {folder}: 1 finding: 1 on scales"
    if not as_json:
        assert done.stdout == ""
        return
    document = json.loads(done.stdout)
    assert document["schema"] == "moe-ckpt/verification"
    assert document["is_clean"] is False
    (found,) = document["findings"]
    assert found["part"] == "scales"
    assert found["where"] == f"{UP}.weight_scale_2"
    assert [runtime["name"] for runtime in document["runtimes"] if runtime["loads"]] == [
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
    ]
    assert document["counts"]["scales"] == 168
    assert document["skipped"] == {"source": "no --source was given"}


def test_the_command_exits_with_0_if_nothing_is_wrong():
    done = run_cli("verify", NVFP4)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("nothing is wrong\n")
    assert done.stdout == ""
    assert run_cli("verify", NVFP4, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("/nowhere",), 3, "is not a folder"),
        (("",), 2, "is empty"),
        ((NVFP4, "--all"), 2, "--source"),
        ((NVFP4, "--sample", "3"), 2, "--source"),
        ((NVFP4, "--sample", "0", "--source", NVFP4), 2, "--sample"),
        ((NVFP4, "--sample", "3", "--all", "--source", NVFP4), 2, "one of them"),
    ],
)
def test_usage_of_the_command(args, code, text):
    done = run_cli("verify", *args)
    assert done.returncode == code
    assert text in done.stderr


def test_importing_it_loads_no_numpy_and_no_torch():
    code = (
        "import sys, moe_ckpt, moe_ckpt.verify;"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
