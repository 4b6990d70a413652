"""Quantized sources: every encoding decodes to what its producer decodes it to, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import load
from kit.files import FIXTURES, read_json
from kit.quantized_sources import gpt_oss, make, refused, same

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.source.headers import TensorInfo
from moe_ckpt.source.weights import find_weights
from moe_ckpt.work.batches import Budget


@pytest.mark.parametrize("key", S.ENCODINGS)
def test_every_weight_is_decoded(tmp_path, key):
    """Experts, attention and head; codes and scales in different shards; blocks at both edges."""
    i, h = (192, 320) if 192 % S.ENCODINGS[key][3] == 0 else (128, 256)
    _, decoded = make(tmp_path, key, i, h, shards=3)
    done = moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16", device="cpu")
    same(load(tmp_path / "out"), {name: w.bfloat16() for name, w in decoded.items()})
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert done.plan.formats == {"bf16": 8}


FUSED = [
    *((S.fp8_block, {"dtype": dtype}, S.FP8) for dtype in ("F32", "BF16", "F16", "F8_E8M0")),
    (S.fp8_tensor, {"dims": None}, S.CT_TENSOR),
    (S.fp8_tensor, {"dims": 3}, S.CT_TENSOR),
    (S.fp8_block, {"dims": 4}, S.FP8),
    (S.fp8_tensor, {"dims": None, **S.TRANSFORMERS}, S.FP8_TENSOR),
    (S.fp8_tensor, {"dims": 3, **S.TRANSFORMERS}, S.FP8_TENSOR),
    (S.fp8_tensor, S.TRANSFORMERS, S.FP8_TENSOR),  # one number for all experts
    (S.mxfp4, {"ending": "_scale_inv", "dtype": "F8_E8M0"}, S.FP8_FP4),
    (S.fp8_channel, {}, S.CT_CHANNEL),
    (S.fp8_channel, {"dims": 1}, S.CT_CHANNEL),
    (S.mxfp8, {"ending": "_scale_inv"}, S.MXFP8),
    (S.mxfp4, {}, S.CT_MXFP4),
]


@pytest.mark.parametrize(("encode", "options", "said"), FUSED)
def test_fused_experts_are_decoded(tmp_path, encode, options, said):
    """Blocks may cover rows of gate and of up."""
    i, h = 192, 320
    tensors, decoded = S.fused(encode, 3, i, h, **options)
    S.save(tmp_path / "in", tensors, said, count=3, i=i, h=h, shards=2)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16")
    same(load(tmp_path / "out"), {name: w.bfloat16() for name, w in decoded.items()})


@pytest.mark.parametrize("budget", [(20000, 5000), (1 << 20, 5000), (60000, 1 << 14)])
def test_blocks_are_decoded_whatever_is_read_at_once(tmp_path, budget):
    """A piece may begin inside a block of up, which follows rows of gate that fill none."""
    _, decoded = make(tmp_path, "fp8-block-F32", 192, 320, beside=False)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="bf16")
    execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=Budget(*budget, 2))
    same(load(tmp_path / "out"), {name: w.bfloat16() for name, w in decoded.items()})


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
@pytest.mark.parametrize(("i", "h"), [(64, 64), (64, 128), (96, 32), (32, 64)])
def test_gpt_oss_decodes_as_transformers_does(tmp_path, i, h, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, decoded = gpt_oss(tmp_path, i, h, dtype=dtype)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16", experts="split")
    found = load(tmp_path / "out")
    weights = {name: w for name, w in found.items() if name.endswith(".weight")}
    same(weights, {name: w.bfloat16() for name, w in decoded.items()})
    for leaf in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{S.QWEN}.{leaf}_{part}"] for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales.view(torch.uint8)).transpose(1, 2)
        bias = tensors[f"{S.QWEN}.{leaf}_bias"]
        for e in range(3):
            names = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
            for n, name in enumerate(names):
                step = len(names)
                ours = found[f"{S.QWEN}.{e}.{name}.weight"]
                assert torch.equal(ours, theirs[e][n::step])
                assert torch.equal(found[f"{S.QWEN}.{e}.{name}.bias"], bias[e][n::step])


@pytest.mark.parametrize(
    ("encode", "dtype"),
    [
        *((S.fp8_block, dtype) for dtype in ("F32", "BF16", "F16", "F8_E8M0")),
        *((S.mxfp8, dtype) for dtype in ("U8", "F8_E8M0")),
    ],
)
def test_fp8_decodes_as_transformers_does(tmp_path, encode, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, _ = S.experts(encode, 2, 128, 256, ending="_scale_inv", dtype=dtype)
    S.save(tmp_path / "in", tensors, S.FP8, count=2, i=128, h=256)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16")
    theirs = Fp8Dequantize(None)
    for name, ours in load(tmp_path / "out").items():
        found = theirs._dequantize_one(
            tensors[name], tensors[f"{name}_scale_inv"], output_dtype=torch.bfloat16
        )
        assert torch.equal(ours, found)


@pytest.mark.parametrize(
    ("encode", "dtype"), [(S.mxfp4, "F8_E8M0"), (S.mxfp4, "U8"), (S.fp8_block, "F8_E8M0")]
)
def test_deepseek_v4_decodes_as_transformers_does(tmp_path, encode, dtype):
    """Names of its own; codes as int8, two in a byte, or FP8."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    module = "layers.0.ffn.experts"
    tensors, _ = S.experts(encode, 2, 128, 256, module=module, ending=".scale", dtype=dtype)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    kind = "fp4" if encode is S.mxfp4 else "fp8"
    sizes = {"count": 2, "i": 128, "h": 256, "model_type": "deepseek_v4", "expert_dtype": kind}
    S.save(tmp_path / "in", tensors, S.FP8, **sizes)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16", experts="split")
    theirs = Fp8Dequantize(None)
    found = load(tmp_path / "out")
    assert len(found) == 6
    for name, ours in found.items():
        scale = tensors[f"{name.removesuffix('.weight')}.scale"]
        expected = theirs._dequantize_one(tensors[name], scale, output_dtype=torch.bfloat16)
        assert torch.equal(ours, expected)
    assert "expert_dtype" not in read_json(tmp_path / "out" / "config.json")


def test_a_scale_of_deepseek_v4_without_its_weight_is_refused(tmp_path):
    tensors, _ = S.experts(S.fp8_block, 2, 128, 128, ending=".scale", dtype="F8_E8M0")
    del tensors[f"{S.QWEN}.1.up_proj.weight"]
    refused(tmp_path, tensors, S.FP8, f"{S.QWEN}.1.up_proj.scale: belongs to no quantized weight")


def test_other_tensors_may_be_called_scale(tmp_path):
    tensors, _ = S.experts(S.fp8_block, 2, 128, 128)
    tensors["model.layers.0.clip.scale"] = torch.ones(4)
    S.save(tmp_path / "in", tensors, S.FP8, count=2, i=128, h=128)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16")
    assert "model.layers.0.clip.scale" in load(tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_number_beside_a_small_matrix_decodes_alike(tmp_path, shape):
    """That of the matrix or of its only block: with two dimensions it is the block's."""
    tensors, decoded = S.experts(S.fp8_tensor, 2, 128, 128, ending="_scale_inv")
    tensors = {n: t.view(shape) if n.endswith("_inv") else t for n, t in tensors.items()}
    S.save(tmp_path / "in", tensors, S.FP8, count=2, i=128, h=128)
    plan = moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16").plan
    same(load(tmp_path / "out"), {name: w.bfloat16() for name, w in decoded.items()})
    what = "FP8 in blocks" if len(shape) == 2 else "FP8 per tensor of transformers"
    assert any(note.endswith(f"6 weights as {what}") for note in plan.notes)


COMPRESSED = [
    key
    for key, row in S.ENCODINGS.items()
    if "config_groups" in row[2] and key not in ("fp8-channel-f16", "int4-g64-f16", "int8-1d")
]


@pytest.mark.parametrize("key", COMPRESSED)
def test_compressed_tensors_decodes_alike(tmp_path, key):
    """Where it decodes in bfloat16 or wider: of float16 scales it rounds twice."""
    tensors, _ = make(tmp_path, key, 128, 256, beside=False)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="bf16")
    said = read_json(tmp_path / "in" / "config.json")["quantization_config"]
    group = {k: v for k, v in said["config_groups"]["group_0"].items() if v is not None}
    group["weights"] = {k: v for k, v in group["weights"].items() if v is not None}
    scheme = QuantizationScheme(**group)
    codec = BaseCompressor.get_value_from_registry(said["format"])
    for name, ours in load(tmp_path / "out").items():
        module = name.removesuffix("weight")
        state = {k.removeprefix(module): t for k, t in tensors.items() if k.startswith(module)}
        if state["weight_scale"].dtype == torch.float8_e8m0fnu:
            state["weight_scale"] = state["weight_scale"].view(torch.uint8)
        theirs = codec.decompress(state, scheme)["weight"].bfloat16()
        assert torch.equal(ours, theirs), name


def modelopt_exports():
    kinds = ("nvfp4", "nvfp4-experts", "nvfp4-w4a16", "fp8", "fp8-channel", "fp8-block", "mxfp8")
    found = [FIXTURES.glob(f"*/modelopt-{kind}") for kind in kinds]
    split = [path for paths in found for path in sorted(paths)]
    return [path for path in split if path.parent.name not in ("gpt_oss", "llama4")]


def decoded_by_formula(stored, name):
    """code * scale * scale_2, by the shapes of what is there."""
    weight = stored[name]
    if weight.dtype not in (torch.uint8, torch.float8_e4m3fn):
        return weight
    scale, n, k = stored[f"{name}_scale"], weight.shape[0], weight.shape[1]
    if weight.dtype == torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
        inner = scale.float() * stored[f"{name}_scale_2"]
        return S.float4_values(codes) * inner.repeat_interleave(16, 1)
    if scale.dtype == torch.uint8:
        return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    if scale.dim() == 4:
        return weight.float() * S.per_block(scale[:, 0, :, 0], 128, 128, (n, k))
    return weight.float() * (scale[:, None] if scale.dim() == 1 else scale)


@pytest.mark.parametrize("folder", modelopt_exports(), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_exports_of_modelopt_are_decoded(tmp_path, folder):
    moe_ckpt.convert(folder, tmp_path / "out", format="bf16")
    stored, found = load(folder), load(tmp_path / "out")
    beside = ("_scale", "_scale_2", "_scale_inv", "input_scale")
    names = [name for name in stored if not name.endswith(beside)]
    expected = {name: decoded_by_formula(stored, name) for name in names}
    same(found, {n: w.bfloat16() if w.dtype == torch.float32 else w for n, w in expected.items()})


@pytest.mark.parametrize(
    ("shape", "scales", "what"),
    [
        ((128, 128), {"_scale": ("F32", (1, 1))}, "FP8 per tensor"),
        ((1, 256), {"_scale": ("F32", (1,))}, "FP8 per tensor"),
        ((2, 256), {"_scale": ("F32", (2,))}, "FP8 per channel"),
        ((2, 256), {"_scale": ("F32", (1, 2))}, "FP8 in blocks"),
        ((1, 32), {"_scale_inv": ("F8_E8M0", (1, 1))}, "FP8 in blocks"),
        ((2, 32), {"_scale_inv": ("F8_E8M0", (2, 1))}, "MXFP8"),
        ((2, 64), {"_scale": ("F32", ()), "_scale_inv": ("U8", (2, 2))}, "MXFP8"),
    ],
)
def test_scales_of_small_matrices_are_of_the_coarsest_kind_that_fits(shape, scales, what):
    infos = [TensorInfo("m.weight", "F8_E4M3", shape, "s", 0, 0)]
    infos += [TensorInfo(f"m.weight{end}", *scale, "s", 0, 0) for end, scale in scales.items()]
    found = find_weights({info.name: info for info in infos})
    assert [stored.kind.name for stored in found.stored.values()] == [what]
