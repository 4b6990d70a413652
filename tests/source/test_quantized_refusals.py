"""Quantized sources that are incomplete, contradict themselves or are hostile: refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import stored_as as S  # noqa: N812
from kit.quantized_sources import ATTENTION, make, refused

import moe_ckpt
from moe_ckpt.errors import MoeCkptError
from moe_ckpt.source.checkpoint import Source
from moe_ckpt.source.headers import TensorInfo
from moe_ckpt.source.weights import weights_of

UP = f"{S.QWEN}.1.up_proj.weight"
ONES = torch.ones(128, 1)


def without(tensors, *endings):
    return {k: t for k, t in tensors.items() if not k.startswith(UP) or not k.endswith(endings)}


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("fp8-block-F32", lambda t: without(t, "_scale_inv"), ["no scale beside it"]),
        ("fp8-block-F32", lambda t: t | {f"{UP}_scale_inv": ONES}, ["F32 [128, 1]"]),
        ("fp8-block-F32", lambda t: t | {f"{UP}_scale_inv": ONES[:1].double()}, ["F64 [1, 1]"]),
        ("fp8-channel-bf16", lambda t: t | {f"{UP}_scale": ONES.T}, ["F32 [1, 128]"]),
        ("fp8-channel-bf16", lambda t: t | {f"{UP}_scale": ONES.int()}, ["I32 [128, 1]"]),
        ("nvfp4-modelopt", lambda t: without(t, "_scale_2"), ["_scale F8_E4M3 [128, 8]"]),
        ("nvfp4-modelopt", lambda t: without(t, "weight_scale"), ["_scale_2 F32 []"]),
        ("nvfp4-ct", lambda t: without(t, "weight_packed"), ["belongs to no quantized weight"]),
        (
            "int4-g32",
            lambda t: t | {f"{UP}_zero_point": ONES.int()},
            ["zero_point: only"],
        ),
        (
            "int4-g32",
            lambda t: t | {f"{UP}_g_idx": torch.arange(128)},
            ["g_idx: only sym"],
        ),
        ("int4-g32", lambda t: t | {UP: ONES.bfloat16()}, ["is stored twice"]),
        ("mxfp4-ct", lambda t: without(t, "_scale"), ["no scale beside it"]),
        ("mxfp8-ct", lambda t: t | {f"{UP}_scale": ONES.expand(128, 4).float()}, ["F32 [128, 4]"]),
        ("int8", lambda t: without(t, "_scale"), ["no scale beside it"]),
    ],
)
def test_incomplete_weights_are_refused(tmp_path, key, change, words):
    tensors, _ = make(tmp_path / "x", key, beside=False)
    refused(tmp_path, change(tensors), S.ENCODINGS[key][2], UP, *words)


@pytest.mark.parametrize(
    "ending",
    [f".weight_{e}" for e in ("scale_inv", "scale", "scale_2", "global_scale", "packed", "shape")]
    + [f".weight_{e}" for e in ("zero_point", "g_idx")]
    + [f"_proj_{e}" for e in ("scale_inv", "blocks", "scales")],
)
def test_what_is_beside_no_weight_is_refused(tmp_path, ending):
    tensors, _ = make(tmp_path / "x", "int4-g32", beside=False)
    name = f"{ATTENTION}.q{ending}"
    words = [name, "belongs to no quantized weight"]
    refused(tmp_path, tensors | {name: torch.ones(4, 4)}, S.ct_int4(32), *words)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "quark", "auto-round", None, 3])
def test_other_methods_are_refused(tmp_path, method):
    tensors, _ = make(tmp_path / "x", "fp8-block-F32", beside=False)
    refused(tmp_path, tensors, {"quant_method": method}, json.dumps(method), "quantization_config")


def test_what_a_part_of_the_config_says_counts(tmp_path):
    tensors, _ = make(tmp_path / "x", "fp8-block-F32", beside=False)
    text = {"quantization_config": {"quant_method": "awq"}}
    words = ['config.json: text_config.quantization_config: quant_method "awq"']
    refused(tmp_path, tensors, None, *words, text_config=text)


@pytest.mark.parametrize(
    ("key", "more", "words"),
    [
        ("fp8-block-F32", {"weight_block_size": [64, 64]}, ["weight_block_size", "[64, 64]"]),
        ("nvfp4-modelopt", {"quant_algo": "NVFP4_AWQ"}, ["NVFP4_AWQ"]),
        ("nvfp4-modelopt", {"quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}}, ["W4A8_AWQ"]),
        ("nvfp4-modelopt", {"quant_method": "fp8"}, ["'fp8' does not describe", "NVFP4"]),
        ("int4-g32", {"quant_method": "fp8"}, ["'fp8' does not describe", "int4"]),
        ("int4-g32", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]),
        ("int4-g32", {"transform_config": {"config_groups": {"R": {}}}}, ["transform_config"]),
        (
            "int4-g32",
            {"config_groups": S.CT_NVFP4["config_groups"]},
            ["'compressed-tensors' does not describe", "int4"],
        ),
        (
            "int4-g32",
            {"config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}}}},
            ["config_groups.a", "8 bits"],
        ),
        (
            "int4-g32",
            {"config_groups": {"a": {"weights": {"num_bits": 4, "symmetric": False}}}},
            ["config_groups.a"],
        ),
    ],
)
def test_a_config_that_says_otherwise_is_refused(tmp_path, key, more, words):
    tensors, _ = make(tmp_path / "x", key, beside=False)
    refused(tmp_path, tensors, S.ENCODINGS[key][2] | more, *words)


def test_one_side_stored_in_two_ways_is_refused(tmp_path):
    tensors, _ = make(tmp_path / "x", "fp8-block-F32", beside=False)
    other, _ = make(tmp_path / "y", "fp8-channel-bf16", beside=False)
    tensors = without(tensors, "_scale_inv") | {k: t for k, t in other.items() if k.startswith(UP)}
    refused(tmp_path, tensors, S.FP8, S.QWEN, "stored in different ways", "FP8 per channel")


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("nvfp4-modelopt", "int4-g32"),
        ("nvfp4-ct", "mxfp4"),
        ("mxfp4-ct", "int4-g32"),
        ("int4-g32", "nvfp4"),
        ("int4-g32", "int4-g64"),
    ],
)
def test_four_bits_are_not_rounded_again_unasked(tmp_path, key, target):
    make(tmp_path / "x", key, beside=False)
    with pytest.raises(moe_ckpt.FormatError, match="--allow-requantize"):
        moe_ckpt.make_plan(tmp_path / "x" / "in", format=target)
    moe_ckpt.convert(tmp_path / "x" / "in", tmp_path / "out", format=target, allow_requantize=True)


def test_transposed_quantized_experts_are_refused(tmp_path):
    tensors, _ = S.fused(S.fp8_channel, 2, 128, 128, module="model.layers.0.feed_forward.experts")
    swapped = {k: t.transpose(1, 2) if t.shape[-1] != 1 else t for k, t in tensors.items()}
    stored = {k: t for k, t in swapped.items() if k.endswith("_scale")}
    stored |= {
        k: t if "down" in k else t.transpose(1, 2) for k, t in tensors.items() if k not in stored
    }
    gate_up = "model.layers.0.feed_forward.experts.gate_up_proj"
    stored[f"{gate_up}_scale"] = torch.ones(2, 128, 1)
    S.save(tmp_path / "in", stored, S.FP8, count=2, i=128, h=128, model_type="llama4_text")
    with pytest.raises(moe_ckpt.CheckpointError, match=r"stored \[in, out\]"):
        moe_ckpt.make_plan(tmp_path / "in", format="bf16")


def test_quantized_stacks_outside_the_experts_are_refused_by_name(tmp_path):
    tensors, _ = make(tmp_path / "x", "fp8-block-F32", beside=False)
    more, _ = S.fused(S.fp8_block, 2, 128, 128, module="mtp.layers.0.mlp.experts")
    S.save(tmp_path / "in", tensors | more, S.FP8, count=2, i=128, h=128)
    with pytest.raises(moe_ckpt.CheckpointError, match=r"mtp\.layers\.0\.mlp\.experts\.down_proj"):
        moe_ckpt.make_plan(tmp_path / "in", format="nvfp4")


@pytest.mark.parametrize("columns", [48, 80])
@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4", "mxfp4"])
def test_a_last_block_that_is_not_whole_is_refused(tmp_path, kind, columns):
    tensors, _ = make(tmp_path / "x", "mxfp8-ct", beside=False)
    name = f"{ATTENTION}.o_proj.weight"
    if kind == "nvfp4":
        columns += 8
        more = {name: torch.zeros(8, columns // 2, dtype=torch.uint8)}
        more[f"{name}_scale"] = S.e4m3(torch.ones(8, -(-columns // 16)))
        more[f"{name}_scale_2"] = torch.tensor(1.0)
    else:
        ending = "" if kind == "mxfp8" else "_packed"
        codes = S.e4m3(torch.ones(8, columns))
        packed = torch.zeros(8, columns // 2, dtype=torch.uint8)
        more = {f"{name}{ending}": packed if ending else codes}
        more[f"{name}_scale"] = torch.full((8, -(-columns // 32)), 127, dtype=torch.uint8)
    S.save(tmp_path / "in", tensors | more, None, count=2, i=128, h=128)
    with pytest.raises(moe_ckpt.CheckpointError, match=r"o_proj\.weight"):
        moe_ckpt.make_plan(tmp_path / "in", format="bf16")


STEMS = [f"{S.QWEN}.0.up_proj.weight", "a.b_proj", "weight", "", "x.weight", "lm_head.weight", "ü"]
ENDINGS = ["", "_scale", "_scale_inv", "_scale_2", "_packed", "_blocks", "_scales", "_shape"]
ENDINGS += ["_global_scale", "_zero_point", "_g_idx", "input_scale", "weight"]
DTYPES = ["F8_E4M3", "U8", "I8", "I32", "F32", "BF16", "F8_E8M0", "I64", "F4", "BOOL"]


@settings(max_examples=400)
@given(
    st.dictionaries(
        st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(ENDINGS)),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.sampled_from([0, 1, 2, 4, 16, 32, 128, 256, 1 << 40]), max_size=5),
        ),
        max_size=8,
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("fp8"),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "quant_method",
                        "quant_algo",
                        "config_groups",
                        "weights",
                        "kv_cache_scheme",
                        "weight_block_size",
                        "format",
                        "quantized_layers",
                        "num_bits",
                        "a",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
)
def test_no_header_makes_it_fail_otherwise(tmp_path_factory, tensors, said):
    infos = {
        name: TensorInfo(name, dtype, tuple(shape), "model.safetensors", 8, 0)
        for name, (dtype, shape) in tensors.items()
    }
    config = {"quantization_config": said}
    root = tmp_path_factory.getbasetemp()
    source = Source(root, config, {}, infos, (), (), ())
    try:
        weights = weights_of(source)
    except MoeCkptError:
        return
    for name in weights.tensors:
        weights.reads(name)
        assert weights.encoded(name).parts
