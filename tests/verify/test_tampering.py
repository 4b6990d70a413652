"""Tensors that were changed, deleted or reshaped: where verify finds that, and what it says."""

from __future__ import annotations

import math
import shutil

import pytest
from kit.files import FIXTURES
from kit.tampering import (
    add,
    change,
    copy,
    delete,
    float32,
    poke,
    tensors_of,
)
from kit.verified import EXPERT, LAYER, NVFP4, STACKED, UP, converted, one

from moe_ckpt.verify import verify

FP8 = FIXTURES / "qwen3_moe" / "modelopt-fp8"
MXFP8 = FIXTURES / "qwen3_moe_wide" / "modelopt-mxfp8"
QUERY = "model.layers.0.self_attn.q_proj"
NAN32, INF32 = float32(math.nan), float32(math.inf)


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
