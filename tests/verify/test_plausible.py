"""Scales that are numbers above 0 and wrong: what they decode to, and what holds nothing."""

from __future__ import annotations

import struct

import pytest
import torch
from kit.command import run_cli
from kit.files import FIXTURES
from kit.tampering import copy, delete, poke, shard_of, tensors_of, write_shard
from kit.verified import EXPERT, LAYER, NVFP4, UP, one
from safetensors.torch import load_file, save_file

import moe_ckpt
from moe_ckpt.verify import verify
from moe_ckpt.verify.findings import ERROR, WARNING

CT = FIXTURES / "qwen3_moe" / "llm-compressor-nvfp4a16"
QWEN = FIXTURES / "qwen3_moe"
LLAMA = FIXTURES / "llama4" / "modelopt-fp8"
WIDE = FIXTURES / "qwen3_moe_wide"
DOWN = f"{EXPERT}.down_proj"


def scaled(folder, ending, change):
    """Change every float32 scale with an ending."""
    for path in folder.glob("*.safetensors"):
        tensors = tensors_of(path)
        for name, tensor in tensors.items():
            if name.endswith(ending):
                values = struct.unpack(f"<{len(tensor.data) // 4}f", tensor.data)
                data = b"".join(struct.pack("<f", change(value)) for value in values)
                tensors[name] = type(tensor)(tensor.dtype, tensor.shape, data)
        write_shard(path, tensors)


# What is done to which scales of an export; whether weights or activations are found wrong.
ALL = {
    "reciprocal": (NVFP4, "weight_scale_2", lambda x: 1 / x, "reciprocal would fit"),
    "amax / 6": (NVFP4, "weight_scale_2", lambda x: x * 448, "448 times smaller would fit"),
    "amax": (NVFP4, "weight_scale_2", lambda x: x * 2688, "times smaller would fit"),
    "a 448th": (NVFP4, "weight_scale_2", lambda x: x / 448 / 448, "at least 0.0001"),
    "not the reciprocal": (CT, "weight_global_scale", lambda x: 1 / x, "reciprocal would fit"),
    "FP8": (QWEN / "modelopt-fp8", "weight_scale", lambda x: 1 / x, "reciprocal would fit"),
    "FP8 amax": (QWEN / "modelopt-fp8", "weight_scale", lambda x: x * 448, "448 times smaller"),
    "Llama 4 amax": (LLAMA, "weight_scale", lambda x: x * 448, "448 times smaller"),
    "FP8 of rows": (QWEN / "modelopt-fp8-channel", "weight_scale", lambda x: 1 / x, "reciprocal"),
    "FP8 of blocks": (WIDE / "modelopt-fp8-block", "weight_scale", lambda x: 1 / x, "reciprocal"),
    "input": (NVFP4, "input_scale", lambda x: 1 / x, "activations of up to"),
    "input amax / 6": (NVFP4, "input_scale", lambda x: x * 448, "activations of up to"),
    "FP8 input": (QWEN / "modelopt-fp8", "input_scale", lambda x: 1 / x, "activations of up to"),
}


@pytest.mark.parametrize("name", ALL)
def test_scales_that_are_all_wrong_alike_are_found(tmp_path, name):
    export, ending, change, text = ALL[name]
    folder = copy(export, tmp_path)
    scaled(folder, ending, change)
    findings = verify(folder)
    found = [f for f in findings.found if text in f.problem and f.where.endswith(ending)]
    assert found, findings.found
    assert found[0].grade == ERROR
    for runtime in findings.runtimes:
        assert bool(runtime.garbage) == runtime.loads


@pytest.mark.parametrize(
    ("change", "grade", "text"),
    [
        (lambda x: 1 / x, ERROR, "its reciprocal would fit"),
        (lambda x: x * 448, ERROR, "a number 448 times smaller would fit"),
        (lambda x: x / 448, WARNING, "a number 448 times larger would fit"),
    ],
)
def test_one_scale_unlike_its_sisters_is_found(tmp_path, change, grade, text):
    folder = copy(NVFP4, tmp_path)
    scaled(folder, f"{DOWN}.weight_scale_2", change)
    (found,) = verify(folder).found
    assert (found.where, found.grade) == (f"{DOWN}.weight_scale_2", grade)
    assert text in found.problem


def test_a_global_scale_that_leaves_block_scales_small_is_a_warning(tmp_path):
    """amax / 6, and the block scales made with it: right numbers, few steps."""
    folder = copy(NVFP4, tmp_path)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("weight_scale_2")]:
            tensors[name] *= 448
            block = name.removesuffix("_2")
            tensors[block] = (tensors[block].float() / 448).to(torch.float8_e4m3fn)
        save_file(tensors, path)
    found = [f for f in verify(folder).found if "scales of blocks are at most 1 " in f.problem]
    assert [f.grade for f in found] == [WARNING]


def test_unequal_inputs_far_from_all_others_are_wrong(tmp_path):
    folder = copy(NVFP4, tmp_path)
    poke(folder, f"{DOWN}.input_scale", struct.pack("<f", 4000))
    assert ERROR in {f.grade for f in verify(folder).found if f.where == f"{DOWN}.input_scale"}


def test_one_input_scale_far_above_what_a_norm_lets_through_is_wrong(tmp_path):
    folder = copy(NVFP4, tmp_path)
    scaled(folder, f"{UP}.input_scale", lambda x: x * 448)
    grades = [f.grade for f in verify(folder).found if f.where == f"{UP}.input_scale"]
    assert grades == [WARNING, ERROR]


def zeroed(folder, name, blocks, *, codes):
    """Scales of 0, over codes that become 0 too or stay."""
    poke(folder, f"{name}.weight_scale", bytes(len(blocks)), blocks[0])
    if codes:
        poke(folder, f"{name}.weight", b"\x80" * (8 * len(blocks)), 8 * blocks[0])


@pytest.mark.parametrize("blocks", [range(1), range(5, 9), range(190, 192)])
def test_scales_of_0_are_wrong_over_codes_that_are_not(tmp_path, blocks):
    folder = copy(NVFP4, tmp_path)
    zeroed(folder, UP, blocks, codes=True)
    found = one(verify(folder), f"{UP}.weight_scale")
    assert found.grade == WARNING
    at = [blocks[0] // 4, blocks[0] % 4]
    assert f"the first at {at}, over codes of 0" in found.problem
    poke(folder, f"{UP}.weight", b"\x10", 8 * blocks[-1] + 7)
    found = one(verify(folder), f"{UP}.weight_scale")
    assert found.grade == ERROR
    assert f"scale is 0.0 at {[blocks[-1] // 4, blocks[-1] % 4]}" in found.problem


def test_a_missing_scale_is_garbage_only_where_a_runtime_loads_it(tmp_path):
    folder = copy(NVFP4, tmp_path)
    delete(folder, f"{UP}.input_scale")
    garbage = {runtime.name: runtime.garbage for runtime in verify(folder).runtimes}
    assert garbage["vLLM"] == f"{UP}.input_scale is wrong or missing"
    assert not garbage["SGLang"]
    done = run_cli("verify", folder)
    assert f"loads it, and computes garbage: {UP}.input_scale is wrong" in done.stderr + done.stdout


def test_a_scale_of_nan_is_garbage_for_all_that_load_it(tmp_path):
    folder = copy(NVFP4, tmp_path)
    poke(folder, f"{UP}.weight_scale", b"\x7f")
    for runtime in verify(folder).runtimes:
        assert bool(runtime.garbage) == runtime.loads


def source_with(folder, change):
    """The source with down_proj of expert 3 changed."""
    source = copy(WIDE / "source", folder)
    path = shard_of(source, f"{LAYER}.down_proj")
    tensors = load_file(path)
    change(tensors[f"{LAYER}.down_proj"][3])
    save_file(tensors, path, {"format": "pt"})
    return source


FORMATS = [
    "nvfp4",
    "fp8-tensor",
    "fp8-channel",
    "fp8-block",
    "int4-g32",
    "int8-channel",
    "mxfp4",
    "mxfp8",
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_a_source_matrix_of_zeros_is_named(tmp_path, name):
    source, out = source_with(tmp_path, lambda weight: weight.zero_()), tmp_path / "out"
    args = ("--stats", WIDE / "stats.json") if name in ("nvfp4", "fp8-tensor") else ()
    done = run_cli("convert", source, out, "--format", name, "--device", "cpu", *args)
    assert done.returncode == 0, done.stderr
    assert f"warning: {DOWN}.weight" in done.stderr
    assert "weights are 0; the matrix puts out nothing" in done.stderr
    done = run_cli("verify", out, "--source", source, "--all")
    assert done.returncode == 0, done.stderr
    assert f"{DOWN}.weight" in done.stderr
    assert "all weights are 0 in the source" in done.stderr
    said = done.stdout + done.stderr
    assert " dB at least, 1 of them exactly" in said
    assert " inf " not in said


@pytest.mark.parametrize("name", ["nvfp4", "fp8-tensor"])
@pytest.mark.slow
def test_a_result_that_an_outlier_turned_to_zeros_is_named(tmp_path, name):
    def change(weight):
        weight[3, 5] = 1e7

    source, out = source_with(tmp_path, change), tmp_path / "out"
    args = ("--format", name, "--stats", WIDE / "stats.json", "--device", "cpu")
    done = run_cli("convert", source, out, *args)
    assert done.returncode == 0, done.stderr
    assert f"warning: {DOWN}.weight: all but 1 of 32,768 weights are 0" in done.stderr
    done = run_cli("verify", out, "--source", source, "--all")
    assert done.returncode == 0, done.stderr
    assert "of 32,768 weights that are not 0 in the source became 0" in done.stderr


def test_weights_that_no_model_has_are_converted_with_a_warning(tmp_path):
    source, out = source_with(tmp_path, lambda weight: weight.mul_(1000)), tmp_path / "out"
    moe_ckpt.convert(source, out, format="nvfp4", stats=[WIDE / "stats.json"], device="cpu")
    found = one(verify(out), f"{DOWN}.weight_scale_2")
    assert found.grade == WARNING


def test_what_is_like_its_sisters_is_not_named_beyond_a_bound(tmp_path):
    folder = copy(NVFP4, tmp_path)
    scaled(folder, "weight_scale_2", lambda x: x * 240)  # half decode to 14, some to 17
    assert not [f for f in verify(folder).found if "decode to" in f.problem]
