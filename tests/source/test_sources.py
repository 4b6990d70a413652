"""Quantized sources: every encoding decodes to what its producer decodes it to, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import load
from kit.files import FIXTURES, read_files, read_json, read_tensors
from kit.with_scales import encode

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.errors import MoeCkptError
from moe_ckpt.formats import find_format
from moe_ckpt.source.checkpoint import Source
from moe_ckpt.source.headers import TensorInfo
from moe_ckpt.source.weights import weights_of
from moe_ckpt.work.batches import Budget

ATTENTION = "model.layers.0.self_attn"


def make(folder, key, i=128, h=128, *, count=2, shards=1, beside=True, step=1, **config):
    """Experts, attention and output head in an encoding; the decoded weights by name."""
    encode, options, said, _ = S.ENCODINGS[key]
    shared = {"shared_amax": True} if encode is S.nvfp4 else {}
    tensors, decoded = S.experts(encode, count, i, h, step=step, **options, **shared)
    for seed, name in enumerate([f"{ATTENTION}.o_proj", "lm_head"] if beside else []):
        more, values = S.linear(encode, name, i, h, seed, **options)
        tensors, decoded = tensors | more, decoded | values
    folder.mkdir(exist_ok=True)
    S.save(folder / "in", tensors, said, count=count, i=i, h=h, shards=shards, **config)
    return tensors, decoded


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(found, expected):
    """These tensors and no others, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def refused(tmp_path, tensors, said, *words, **config):
    """One line, nothing written."""
    S.save(tmp_path / "in", tensors, said, count=2, i=128, h=128, **config)
    with pytest.raises(moe_ckpt.CheckpointError) as caught:
        moe_ckpt.convert(tmp_path / "in", tmp_path / "out", device="cpu")
    (line,) = caught.value.problems
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


# Decoding


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


def gpt_oss(folder, i, h, *, count=3, dtype="U8", step=1, **more):
    """A layer of gpt-oss as it is released."""
    tensors, decoded = S.fused(S.mxfp4, count, i, h, interleaved=True, blocks=True, step=step)
    if dtype != "U8":
        tensors = {
            k: t.view(torch.float8_e8m0fnu) if k.endswith("_scales") else t
            for k, t in tensors.items()
        }
    rows = torch.arange(count * 2 * i).view(count, 2 * i).bfloat16()
    tensors |= {f"{S.QWEN}.gate_up_proj_bias": rows}
    tensors |= {f"{S.QWEN}.down_proj_bias": torch.arange(count * h).view(count, h).bfloat16()}
    tensors |= more
    folder.mkdir(exist_ok=True)
    sizes = {"count": count, "i": i, "h": h, "model_type": "gpt_oss"}
    S.save(folder / "in", tensors, S.MXFP4, shards=2, **sizes)
    return tensors, decoded


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


# Requantizing


TARGETS = ("nvfp4", "fp8-channel", "int8-channel", "int4-g32", "mxfp8", "fp8-block")
BUDGETS = [None, Budget(3000, 20, 2), Budget(40000, 1 << 12, 3)]
CUTS = [None, Budget(20000, 5000, 2)]  # for sizes of 128 and more


def requantized(decoded, target):
    """The parts of decoded weights, by weight name and role, gate and up with one amax."""
    row = find_format(target)
    for name, weight in decoded.items():
        pair = ("gate_proj", "up_proj") if "down_proj" not in name else ("down_proj",)
        leaf = name.split(".")[-2]
        near = [name.replace(f".{leaf}.", f".{other}.") for other in pair]
        amax = torch.stack([decoded[other].abs().amax() for other in near]).amax().view(1)
        if row.amax_of_rows:
            amax = weight.abs().amax(-1)[None]
        parts = encode(row, weight.contiguous()[None], amax)
        for role, value in parts.items():
            yield name, role, value[0]


def spelled(plan, name, role):
    from moe_ckpt.dialects import find_dialect

    dialect = find_dialect(plan.dialect)
    (target,) = plan.formats
    return dialect.tensor_name(target, name.removesuffix(".weight"), role, False), (
        role in dialect.spellings[target].inverse
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "key", ["fp8-block-BF16", "fp8-channel-1d", "mxfp8-ct", "nvfp4-ct", "int8"]
)
def test_requantizing_is_quantizing_the_decoded_weights(tmp_path, key, target):
    _, decoded = make(tmp_path, key, 128, 256, beside=False)
    source = find_format(
        S.ENCODINGS[key][0].__name__.replace("_", "-") if key != "int8" else "int8-channel"
    ).name
    if target.removesuffix("-w4a16") == source:
        return
    plan = moe_ckpt.make_plan(tmp_path / "in", format=target, allow_requantize=True)
    outs = []
    for number, budget in enumerate(CUTS):
        out = tmp_path / f"out{number}"
        execute(plan, out, backend=backend_for("cpu"), budget=budget)
        outs.append(read_files(out))
    assert all(files == outs[0] for files in outs)
    found = load(tmp_path / "out0")
    for name, role, value in requantized(decoded, target):
        key_, inverse = spelled(plan, name, role)
        expected = 1 / value if inverse else value
        assert torch.equal(bits(found[key_]), bits(expected)), key_


@pytest.mark.parametrize("target", ["fp8-channel", "mxfp8", "int8-channel", "fp8-block"])
@pytest.mark.parametrize("kind", ["gpt_oss", "fp8_block"])
def test_requantizing_fused_experts(tmp_path, kind, target):
    """Interleaved or not, a block of the source may lie across gate and up."""
    i, h = (128, 256)
    if kind == "gpt_oss":
        _, decoded = gpt_oss(tmp_path, i, h)
    else:
        i, h = (192, 320) if target != "fp8-block" else (128, 384)
        tensors, decoded = S.fused(S.fp8_block, 3, i, h)
        S.save(tmp_path / "in", tensors, S.FP8, count=3, i=i, h=h)
    if target == "fp8-block" and kind == "fp8_block":
        return
    plan = moe_ckpt.make_plan(tmp_path / "in", format=target, experts="split")
    for number, budget in enumerate(CUTS):
        execute(plan, tmp_path / f"out{number}", backend=backend_for("cpu"), budget=budget)
    assert len({str(read_files(tmp_path / f"out{n}")) for n in range(len(CUTS))}) == 1
    found = load(tmp_path / "out0")
    for name, role, value in requantized(decoded, target):
        key, _ = spelled(plan, name, role)
        assert torch.equal(bits(found[key]), bits(value)), key


# Recoding


def only(found, *endings):
    return {name: t for name, t in found.items() if name.endswith(endings)}


@pytest.mark.parametrize("key", ["nvfp4-modelopt", "nvfp4-modelopt-1d"])
def test_nvfp4_to_compressed_tensors_and_back(tmp_path, key):
    tensors, _ = make(tmp_path, key, 128, 256, shards=2)
    for name in [name for name in tensors if name.startswith("lm_head")]:
        del tensors[name]  # what is built unquantized is decoded
    there, back = tmp_path / "there", tmp_path / "back"
    options = {"format": "nvfp4", "quantize": "linear"}
    moe_ckpt.convert(tmp_path / "in", there, dialect="compressed-tensors", **options)
    moe_ckpt.convert(there, back, dialect="modelopt", **options)
    first, found = load(there), load(back)
    assert found.keys() == tensors.keys() | {"lm_head.weight"}
    for name, tensor in tensors.items():
        if name.endswith(("scale_2", "input_scale")):
            assert abs(found[name].view(torch.int32) - tensor.view(torch.int32)) <= 1, name
        else:
            assert torch.equal(bits(found[name]), bits(tensor)), name
            packed = name.endswith(".weight")
            other = first[f"{name}_packed" if packed else name]
            assert torch.equal(bits(other), bits(tensor))
    again = tmp_path / "again"
    moe_ckpt.convert(there, again, dialect="compressed-tensors", **options)
    assert read_tensors(again) == read_tensors(there)


def test_a_quantized_output_head_is_decoded_and_nothing_else(tmp_path):
    _tensors, decoded = make(tmp_path, "nvfp4-modelopt", 128, 256)
    for dialect in ("modelopt", "compressed-tensors"):
        out = tmp_path / dialect
        moe_ckpt.convert(tmp_path / "in", out, dialect=dialect, format="nvfp4")
        found = load(out)
        assert torch.equal(found["lm_head.weight"], decoded["lm_head.weight"].bfloat16())
        assert "bf16" not in {str(t.dtype) for n, t in found.items() if ".experts." in n}
        assert f"{ATTENTION}.o_proj.weight_scale" in found


def test_fused_fp8_blocks_become_split_ones(tmp_path):
    tensors, _ = S.fused(S.fp8_block, 3, 128, 384)
    S.save(tmp_path / "in", tensors, S.FP8, count=3, i=128, h=384)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="fp8-block")
    expected = {}
    for leaf, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for suffix in ("", "_scale_inv"):
            for e, matrix in enumerate(tensors[f"{S.QWEN}.{leaf}{suffix}"]):
                for name, half in zip(names, matrix.chunk(len(names)), strict=True):
                    expected[f"{S.QWEN}.{e}.{name}.weight{suffix}"] = half
    for number, budget in enumerate(CUTS):
        execute(plan, tmp_path / str(number), backend=backend_for("cpu"), budget=budget)
        same(load(tmp_path / str(number)), expected)


SAME = {
    "fp8-block-BF16": "fp8-block",
    "fp8-block-F8_E8M0": "fp8-block",
    "fp8-block-4d": "fp8-block",
    "fp8-channel-bf16": "fp8-channel",
    "fp8-tensor-1d": "fp8-tensor",
    "mxfp8-inv": "mxfp8",
    "mxfp4-ct-e8m0": "mxfp4",
    "int4-g32": "int4-g32",
    "int4-g64-f16": "int4-g64",
    "int4-g128-f32": "int4-g128",
    "int8": "int8-channel",
}


@pytest.mark.parametrize("key", SAME)
def test_codes_and_scales_of_the_same_format_are_kept(tmp_path, key):
    tensors, decoded = make(tmp_path, key, 128, 256, beside=False)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format=SAME[key])
    found = load(tmp_path / "out")
    for name in decoded:
        for ending in ("", "_packed"):
            if f"{name}{ending}" in tensors:
                ours, theirs = found[f"{name}{ending}"], tensors[f"{name}{ending}"]
                assert torch.equal(bits(ours), bits(theirs))
        scale = next(t for k, t in tensors.items() if k in (f"{name}_scale", f"{name}_scale_inv"))
        ours = next(t for k, t in found.items() if k in (f"{name}_scale", f"{name}_scale_inv"))
        if scale.dtype == torch.float8_e8m0fnu and ours.dtype == torch.uint8:
            scale = scale.view(torch.uint8)
        assert torch.equal(ours.float().view(-1), scale.float().view(-1))
        if key.startswith("int4"):
            assert ours.dtype == scale.dtype
            assert found[f"{name}_shape"].tolist() == tensors[f"{name}_shape"].tolist()
    inputs = only(found, "input_scale")
    assert {float(t) for t in inputs.values()} == ({0.5} if "tensor" in key else set())


def test_gpt_oss_becomes_split_mxfp4(tmp_path):
    tensors, _ = gpt_oss(tmp_path, 64, 96)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="mxfp4", experts="split")
    for number, budget in enumerate(BUDGETS):
        execute(plan, tmp_path / str(number), backend=backend_for("cpu"), budget=budget)
        found = load(tmp_path / str(number))
        for leaf, names in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            for part, ending in (("blocks", "weight_packed"), ("scales", "weight_scale")):
                stored = tensors[f"{S.QWEN}.{leaf}_{part}"].flatten(2)
                for e, matrix in enumerate(stored):
                    for n, name in enumerate(names):
                        ours = found[f"{S.QWEN}.{e}.{name}.{ending}"]
                        assert torch.equal(ours, matrix[n :: len(names)])


def decoded_nvfp4(found, name):
    codes = torch.stack((found[name] & 15, found[name] >> 4), -1).flatten(1)
    scale = found[f"{name}_scale"].float() * found[f"{name}_scale_2"]
    return S.float4_values(codes) * scale.repeat_interleave(16, 1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_mxfp4_becomes_nvfp4_exactly(tmp_path, budget):
    _, decoded = gpt_oss(tmp_path, 64, 96, step=4)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4", experts="split")
    done = execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    found = load(tmp_path / "out")
    assert done.inexact_blocks == 0
    assert all(torch.equal(decoded_nvfp4(found, name), w) for name, w in decoded.items())


@pytest.mark.parametrize("budget", BUDGETS)
def test_fused_mxfp4_becomes_fused_nvfp4_exactly(tmp_path, budget):
    """In the names and shapes of ModelOpt's own export."""
    _tensors, decoded = gpt_oss(tmp_path, 64, 96, step=4)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4", experts="fused")
    done = execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    assert done.inexact_blocks == 0
    found = load(tmp_path / "out")
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"{S.QWEN}.{leaf}"
        packed = found[name].transpose(1, 2)
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(2)
        scale = found[f"{name}_weight_scale"].transpose(1, 2).float()
        values = S.float4_values(codes) * scale.repeat_interleave(16, 2)
        values = values * found[f"{name}_weight_scale_2"]
        for e in range(3):
            names = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
            for n, projection in enumerate(names):
                expected = decoded[f"{S.QWEN}.{e}.{projection}.weight"]
                assert torch.equal(values[e][n :: len(names)], expected)
    theirs = load(FIXTURES / "gpt_oss" / "modelopt-nvfp4")
    for name, tensor in theirs.items():
        if name.startswith(S.QWEN):
            assert (found[name].dtype, found[name].dim()) == (tensor.dtype, tensor.dim()), name
    assert {n for n in theirs if n.startswith(S.QWEN)} == set(found)


@pytest.mark.parametrize("stage_nbytes", [1, 1 << 20])
@pytest.mark.parametrize(("i", "h"), [(64, 64), (96, 32)])
def test_fused_mxfp4_becomes_the_model_before_it_was_quantized(tmp_path, i, h, stage_nbytes):
    """As transformers decodes it: [E, in, out], gate and up interleaved."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, _ = gpt_oss(tmp_path, i, h)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="bf16")
    assert plan.experts_as == "fused"
    assert "transformers" in plan.runtimes
    budget = Budget(stage_nbytes, 1 << 12, 2)
    execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    found = load(tmp_path / "out")
    for leaf in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{S.QWEN}.{leaf}_{part}"] for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales)
        assert torch.equal(found[f"{S.QWEN}.{leaf}"], theirs)
        bias = f"{S.QWEN}.{leaf}_bias"
        assert torch.equal(found[bias], tensors[bias])
    assert not any("blocks" in name or "scales" in name for name in found)


@pytest.mark.parametrize("budget", BUDGETS)
def test_fused_mxfp4_becomes_the_fused_bf16_that_runtimes_read(tmp_path, budget):
    _tensors, decoded = gpt_oss(tmp_path, 64, 96, step=4)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="bf16")
    execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    found = load(tmp_path / "out")
    for e in range(3):
        gate_up, down = (found[f"{S.QWEN}.{n}"][e].T for n in ("gate_up_proj", "down_proj"))
        parts = {"gate_proj": gate_up[::2], "up_proj": gate_up[1::2], "down_proj": down}
        for name, part in parts.items():
            assert torch.equal(part.float(), decoded[f"{S.QWEN}.{e}.{name}.weight"])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("as_", ["split", "fused"])
def test_blocks_that_nvfp4_cannot_hold_are_counted(tmp_path, as_, budget):
    """E4M3 has powers of two from 2**-9 to 2**8; three more can be held by smaller codes."""
    tensors, _ = gpt_oss(tmp_path / "x", 64, 64, count=2)
    blocks, scales = (tensors[f"{S.QWEN}.down_proj_{part}"] for part in ("blocks", "scales"))
    blocks.fill_(0x77)  # 6.0 throughout
    scales.fill_(127)
    scales[0, 0, 0] = 127 - 17  # still exact
    scales[0, 1, 1] = 127 - 18  # 3.0, exact
    scales[0, 2, 1] = 127 - 20  # 0.75, which rounds
    scales[1, 3, 0] = 127 - 30
    gpt_oss(tmp_path, 64, 64, count=2, **{k: t for k, t in tensors.items() if "down_proj_" in k})
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4", experts=as_)
    done = execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    assert done.inexact_blocks == 2


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_largest_exponent_may_lie_in_any_piece(tmp_path, budget):
    tensors, _ = gpt_oss(tmp_path / "x", 64, 64, count=2)
    scales = tensors[f"{S.QWEN}.down_proj_scales"]
    scales.fill_(127)
    scales[:, -1, -1] = 127 + 17
    gpt_oss(tmp_path, 64, 64, count=2, **{f"{S.QWEN}.down_proj_scales": scales})
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4", experts="split")
    done = execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    assert done.inexact_blocks == 0
    name = f"{S.QWEN}.1.down_proj.weight"
    assert float(load(tmp_path / "out")[f"{name}_scale_2"]) == 2.0 ** (17 - 8)


def test_weights_only_nvfp4_is_the_same_codes(tmp_path):
    _, decoded = gpt_oss(tmp_path / "x", 64, 96, step=4)
    options = {"format": "nvfp4-w4a16", "experts": "split"}
    moe_ckpt.convert(tmp_path / "x" / "in", tmp_path / "cast", **options)
    found = load(tmp_path / "cast")
    assert not only(found, "input_scale")
    assert all(torch.equal(decoded_nvfp4(found, name), w) for name, w in decoded.items())
    tensors, _ = make(tmp_path, "nvfp4-modelopt", beside=False)
    weights = {name: t for name, t in tensors.items() if not name.endswith("input_scale")}
    moe_ckpt.convert(tmp_path / "in", tmp_path / "without", format="nvfp4-w4a16")
    same(load(tmp_path / "without"), weights)
    moe_ckpt.convert(tmp_path / "without", tmp_path / "again", format="nvfp4")
    one = {name: torch.tensor(1.0) for name in tensors if name.endswith("input_scale")}
    same(load(tmp_path / "again"), weights | one)


def test_a_reciprocal_comes_back_to_the_last_bit(tmp_path):
    tensors, _ = S.experts(S.nvfp4, 16, 16, 16, dialect="ct", dims=1)
    for name in tensors:
        if name.endswith("_global_scale"):
            e = int(name.split(".experts.")[1].split(".")[0])
            tensors[name] = torch.tensor([41.0 + 2 * e])
    S.save(tmp_path / "in", tensors, S.CT_NVFP4, count=16, i=16, h=16)
    options = {"format": "nvfp4", "dialect": "compressed-tensors"}
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", **options)
    same(load(tmp_path / "out"), tensors)


def test_gate_and_up_of_fp8_keep_a_scale_each(tmp_path):
    tensors, _ = make(tmp_path / "x", "fp8-tensor-0d", beside=False)
    tensors[f"{S.QWEN}.0.up_proj.weight_scale"] *= 2
    S.save(tmp_path / "in", tensors, S.MODELOPT, count=2, i=128, h=128)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="fp8-tensor")
    same(load(tmp_path / "out"), tensors)


def test_gate_and_up_with_different_scales_are_refused_by_name(tmp_path):
    tensors, _ = make(tmp_path / "x", "nvfp4-modelopt", beside=False)
    tensors[f"{S.QWEN}.0.up_proj.weight_scale_2"] *= 2
    words = f"{S.QWEN}.0.gate_proj.weight and {S.QWEN}.0.up_proj.weight: have different"
    refused(tmp_path, tensors, S.MODELOPT, words)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "bf16", format="bf16")


BAD = [
    (key, ending, value)
    for key, ending, values in (
        ("fp8-tensor-0d", "_scale", (0.0, -1.0, float("nan"), float("inf"))),
        ("fp8-channel-1d", "_scale", (-1.0, float("nan"), float("inf"))),
        ("fp8-block-F32", "_scale_inv", (-1.0, float("nan"))),
        ("nvfp4-modelopt", "_scale_2", (0.0, -1.0, float("nan"))),
        ("nvfp4-modelopt", "_scale", (-1.0, float("nan"))),
        ("nvfp4-ct", "_global_scale", (0.0, -1.0, float("nan"), float("inf"))),
        ("int4-g32", "_scale", (-1.0, float("nan"))),
        ("mxfp4-ct", "_scale", (255,)),
        ("mxfp8-ct", "_scale", (255,)),
        ("int8", "_scale", (float("nan"),)),
    )
    for value in values
]


@pytest.mark.parametrize("target", ["bf16", "same", "nvfp4"])
@pytest.mark.parametrize(("key", "ending", "value"), BAD)
def test_scales_that_are_no_scales_are_refused_by_name(tmp_path, key, ending, value, target):
    tensors, _ = make(tmp_path / "x", key, beside=False)
    name = f"{S.QWEN}.1.up_proj.weight"
    scale = tensors[f"{name}{ending}"]
    flat = scale.float().view(-1)
    flat[-1] = value
    tensors[f"{name}{ending}"] = flat.to(scale.dtype).view(scale.shape)
    said = S.ENCODINGS[key][2]
    S.save(tmp_path / "in", tensors, said, count=2, i=128, h=128)
    format_ = {"same": find_same(key)}.get(target, target)
    with pytest.raises(moe_ckpt.CheckpointError, match=r"1\.up_proj\.weight.*(scale|weight) is"):
        moe_ckpt.convert(
            tmp_path / "in", tmp_path / "out", format=format_, allow_requantize=True, device="cpu"
        )
    assert not (tmp_path / "out").exists()


def find_same(key):
    kinds = ("fp8-tensor", "fp8-channel", "fp8-block", "nvfp4", "mxfp4", "mxfp8", "int4-g32")
    return next((kind for kind in kinds if key.startswith(kind)), "int8-channel")


@pytest.mark.parametrize("budget", CUTS)
@pytest.mark.parametrize("target", ["bf16", "fp8-block", "nvfp4"])
def test_codes_and_scales_that_are_nan_are_named_where_they_lie(tmp_path, target, budget):
    """By their rows in the tensor that holds them, whatever piece of it was read."""
    tensors, _ = make(tmp_path / "x", "fp8-block-F32", 256, 128, beside=False)
    name = f"{S.QWEN}.1.up_proj.weight"
    changes = {
        "weight is nan at row 131, column 4;": (name, 131, 4),
        "block_scale is nan at row 1, column 0;": (f"{name}_scale_inv", 1, 0),
    }
    for number, (words, (key, row, column)) in enumerate(changes.items()):
        changed = tensors | {key: tensors[key].clone()}
        changed[key][row, column] = torch.nan
        S.save(tmp_path / f"in{number}", changed, S.FP8, count=2, i=256, h=128)
        plan = moe_ckpt.make_plan(tmp_path / f"in{number}", format=target)
        with pytest.raises(moe_ckpt.CheckpointError, match=words) as caught:
            execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
        assert name in str(caught.value)


# What stays


def deepseek(folder, said=S.FP8, encode=S.fp8_block, **options):
    """DeepSeek-V3: a dense layer, a layer of experts, and one for multi-token prediction."""
    i, h = 128, 256
    tensors, decoded = {}, {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        linears = {f"{prefix}.self_attn.kv_a_proj_with_mqa": (192, h)}
        linears |= {
            f"{prefix}.self_attn.q_a_proj": (128, h),
            f"{prefix}.self_attn.o_proj": (h, 128),
        }
        mlp = f"{prefix}.mlp" if layer == 0 else f"{prefix}.mlp.shared_experts"
        linears |= {f"{mlp}.{p}": (i, h) for p in ("gate_proj", "up_proj")}
        linears |= {f"{mlp}.down_proj": (h, i)}
        for seed, (name, shape) in enumerate(linears.items()):
            more, values = S.linear(encode, name, *shape, seed, **options)
            tensors, decoded = tensors | more, decoded | values
        if layer:
            more, values = S.experts(encode, 2, i, h, module=f"{prefix}.mlp.experts", **options)
            tensors, decoded = tensors | more, decoded | values
            tensors[f"{prefix}.mlp.gate.weight"] = torch.ones(2, h).bfloat16()
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(h, 2 * h).bfloat16()
    tensors["lm_head.weight"] = torch.ones(64, h).bfloat16()
    config = {"num_hidden_layers": 2, "n_routed_experts": 2, "num_nextn_predict_layers": 1}
    sizes = {"count": 2, "i": i, "h": h, "model_type": "deepseek_v3"}
    S.save(folder / "in", tensors, said, **sizes, **config)
    return tensors, decoded


def test_deepseek_to_nvfp4_decodes_the_rest_and_says_so(tmp_path):
    _, decoded = deepseek(tmp_path)
    plan = moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="nvfp4").plan
    found = load(tmp_path / "out")
    stays = {name for name in decoded if "layers.1.mlp.experts" not in name}
    assert all(torch.equal(found[name], decoded[name].bfloat16()) for name in stays)
    assert any("decoded to bf16" in note and f"{len(stays)} weights" in note for note in plan.notes)
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert said["quant_method"] == "modelopt"
    text = " ".join(said["ignore"])
    for part in ("model.layers.0.self_attn", "model.layers.2", "shared_experts", "lm_head"):
        assert part in text or f"*{part.split('.')[-1]}" in text, (part, said["ignore"])
    assert not only(found, "_scale_inv")
    same_experts = [name for name in found if "layers.2.mlp.experts" in name]
    assert len(same_experts) == 6


def test_deepseek_to_fp8_is_byte_for_byte_the_source(tmp_path):
    _, decoded = deepseek(tmp_path)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="fp8-block")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "in")
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    listed = set(said["modules_to_not_convert"])
    assert not listed & {name.removesuffix(".weight") for name in decoded}
    assert not any("experts" in name for name in listed)
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"} <= listed


def test_compressed_tensors_keeps_fp8_blocks_beside_nvfp4(tmp_path):
    tensors, decoded = deepseek(tmp_path)
    moe_ckpt.convert(
        tmp_path / "in", tmp_path / "out", format="nvfp4", dialect="compressed-tensors"
    )
    found = load(tmp_path / "out")
    for name in decoded:
        if "layers.1.mlp.experts" in name:
            assert f"{name}_packed" in found
            continue
        assert torch.equal(bits(found[name]), bits(tensors[name]))
        assert torch.equal(found[f"{name}_scale"], tensors[f"{name}_scale_inv"])
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    formats = {group["format"] for group in said["config_groups"].values()}
    assert formats == {"nvfp4-pack-quantized", "float-quantized"}
    assert not any("self_attn" in entry for entry in said["ignore"])


def test_fp8_attention_beside_int4_experts_stays_a_group(tmp_path):
    tensors, _ = S.experts(S.int4, 2, 128, 128)
    more, _ = S.linear(S.fp8_channel, f"{ATTENTION}.o_proj", 128, 128)
    said = S.ct_int4(32)
    said["config_groups"] |= {"group_1": S.CT_CHANNEL["config_groups"]["group_0"]}
    S.save(tmp_path / "in", tensors | more, said, count=2, i=128, h=128)
    moe_ckpt.convert(
        tmp_path / "in",
        tmp_path / "out",
        format="nvfp4",
        dialect="compressed-tensors",
        allow_requantize=True,
    )
    found = load(tmp_path / "out")
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in more.items())
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]
    assert {g["weights"]["num_bits"] for g in groups.values()} == {4, 8}


def test_fp8_without_input_scale_is_not_given_one(tmp_path):
    """A scale of 1.0 would clip activations above 448."""
    _, decoded = make(tmp_path, "fp8-tensor-dynamic")
    with pytest.raises(moe_ckpt.UsageError, match="needs --stats"):
        moe_ckpt.make_plan(tmp_path / "in", format="fp8-tensor")
    for dialect in ("modelopt", "compressed-tensors"):
        moe_ckpt.convert(tmp_path / "in", tmp_path / dialect, format="nvfp4", dialect=dialect)
        found = load(tmp_path / dialect)
        name = f"{ATTENTION}.o_proj.weight"
        assert torch.equal(found[name], decoded[name].bfloat16())


def test_fp8_with_input_scales_keeps_them_whatever_the_statistics_say(tmp_path):
    tensors, _ = make(tmp_path, "fp8-tensor-0d")
    stats = tmp_path / "stats.json"
    entries = {f"{S.QWEN}.{e}.{p}": {"input_amax": 7.0} for e in range(2) for p in S.PROJECTIONS}
    text = {"schema": "moe-ckpt/stats", "version": 1, "modules": entries}
    stats.write_text(json.dumps(text))
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="nvfp4", stats=[stats])
    found = load(tmp_path / "out")
    assert float(found[f"{ATTENTION}.o_proj.input_scale"]) == 0.5
    assert torch.equal(
        bits(found[f"{ATTENTION}.o_proj.weight"]), bits(tensors[f"{ATTENTION}.o_proj.weight"])
    )


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_scales_of_the_kv_cache_pass_through(tmp_path, dialect):
    tensors, _ = make(tmp_path / "x", "nvfp4-modelopt", beside=False)
    scales = {f"{ATTENTION}.{n}_proj.{n}_scale": torch.tensor(0.25) for n in "kv"}
    number = {"num_bits": 8, "type": "float", "dynamic": False}
    said = S.MODELOPT | {"kv_cache_scheme": number}
    S.save(tmp_path / "in", tensors | scales, said, count=2, i=128, h=128)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="nvfp4", dialect=dialect)
    found = load(tmp_path / "out")
    if dialect == "compressed-tensors":  # it has them at the attention itself
        scales = {f"{ATTENTION}.{n}_scale": torch.tensor(0.25) for n in "kv"}
    assert all(torch.equal(found[name], tensor) for name, tensor in scales.items())
    assert {name for name in found if name.endswith(("k_scale", "v_scale"))} == set(scales)
    scheme = read_json(tmp_path / "out" / "config.json")["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)


@pytest.mark.parametrize(
    "other",
    [
        {"num_bits": 4},
        {"type": "int"},
        {"dynamic": True},
        {"symmetric": False},
        {"strategy": "channel"},
    ],
)
def test_another_kv_cache_is_not_taken_for_fp8(tmp_path, other):
    tensors, _ = make(tmp_path / "x", "nvfp4-modelopt", beside=False)
    number = {"num_bits": 8, "type": "float", "dynamic": False}
    said = S.MODELOPT | {"kv_cache_scheme": number | other}
    S.save(tmp_path / "in", tensors, said, count=2, i=128, h=128)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4")
    assert any("KV cache scheme" in warning for warning in plan.warnings)
    assert "kv_cache_scheme" not in plan.files["config.json"]


def test_either_file_may_say_what_the_kv_cache_is(tmp_path):
    make(tmp_path, "nvfp4-modelopt", beside=False)
    said = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "in" / "hf_quant_config.json").write_text(json.dumps(said))
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4")
    assert "kv_cache_scheme" in plan.files["config.json"]


def test_weights_only_nvfp4_stays_weights_only(tmp_path):
    tensors, _ = make(tmp_path, "nvfp4-w4a16")
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="nvfp4-w4a16")
    found = load(tmp_path / "out")
    kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    assert found.keys() == kept.keys() | {"lm_head.weight"}
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in kept.items())


def test_columns_that_the_format_cannot_have_are_decoded(tmp_path):
    """What stays in its form must be what the format is said to be: whole blocks of columns."""
    _, decoded = make(tmp_path, "fp8-block-BF16", 192, 320)
    options = {"format": "nvfp4", "dialect": "compressed-tensors"}
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", **options)
    name = f"{ATTENTION}.o_proj.weight"
    assert torch.equal(load(tmp_path / "out")[name], decoded[name].bfloat16())


def test_kept_experts_in_two_formats_are_decoded(tmp_path):
    """The experts of a layer are one module: they cannot stay int8 here and fp8 there."""
    tensors, decoded = S.experts(S.int8, 2, 128, 128)
    down, values = S.experts(S.fp8_channel, 2, 128, 128)
    tensors = {k: t for k, t in tensors.items() if "down_proj" not in k}
    tensors |= {k: t for k, t in down.items() if "down_proj" in k}
    decoded |= {k: t for k, t in values.items() if "down_proj" in k}
    linear = torch.arange(128 * 128).view(128, 128).bfloat16()
    tensors[f"{ATTENTION}.o_proj.weight"] = linear
    S.save(tmp_path / "in", tensors, {"quant_method": "compressed-tensors"}, count=2, i=128, h=128)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.o_proj"\nformat = "fp8-channel"\n')
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", recipe=recipe)
    found = load(tmp_path / "out")
    assert all(torch.equal(found[name], w.bfloat16()) for name, w in decoded.items())


def test_what_the_dialect_cannot_mix_is_decoded(tmp_path):
    """SGLang takes ModelOpt's mixes without NVFP4 for something else."""
    _, decoded = make(tmp_path, "fp8-tensor-0d")
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="mxfp8", dialect="modelopt")
    name = f"{ATTENTION}.o_proj.weight"
    assert torch.equal(load(tmp_path / "out")[name], decoded[name].bfloat16())


def stats_of(tmp_path, amax):
    """Statistics of the experts, one amax for all of them."""
    entries = {f"{S.QWEN}.{e}.{p}": {"input_amax": amax} for e in range(2) for p in S.PROJECTIONS}
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"schema": "moe-ckpt/stats", "version": 1, "modules": entries}))
    return [path]


def input_scales(folder):
    return {float(t) for t in only(load(folder), "input_scale").values()}


def test_statistics_come_before_the_input_scales_of_the_source(tmp_path):
    make(tmp_path, "nvfp4-modelopt", beside=False)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "kept", format="nvfp4")
    assert input_scales(tmp_path / "kept") == {0.25}
    stats = stats_of(tmp_path, 2688.0 * 4)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "new", format="nvfp4", stats=stats)
    assert input_scales(tmp_path / "new") == {4.0}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_input_scales_have_any_float_type(tmp_path, dtype):
    """vLLM loads them into float32, and llm-compressor saves them in the type of the model."""
    encode = {"encode": S.fp8_tensor, "inputs": 0.375, "input_dtype": dtype, "dims": 1}
    tensors, _ = S.experts(count=2, i=32, h=32, **encode)
    S.save(tmp_path / "in", tensors, S.CT_TENSOR, count=2, i=32, h=32)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="fp8-tensor")
    found = only(load(tmp_path / "out"), "input_scale")
    assert {(t.dtype, float(t)) for t in found.values()} == {(torch.float32, 0.375)}


def test_two_input_scales_are_none(tmp_path):
    tensors, _ = make(tmp_path / "x", "fp8-tensor-0d", beside=False)
    tensors |= {k: torch.ones(2).bfloat16() for k in tensors if k.endswith("input_scale")}
    S.save(tmp_path / "in", tensors, S.MODELOPT, count=2, i=128, h=128)
    with pytest.raises(moe_ckpt.UsageError, match="needs --stats"):
        moe_ckpt.make_plan(tmp_path / "in", format="fp8-tensor")


def test_input_scales_of_another_format_are_not_taken_over(tmp_path):
    """They are amax / 448 for FP8, and amax / 2688 for NVFP4."""
    make(tmp_path, "fp8-tensor-0d", beside=False)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="nvfp4")
    assert input_scales(tmp_path / "out") == {1.0}


def test_input_scales_of_another_format_do_not_stand_in_for_statistics(tmp_path):
    tensors, _ = make(tmp_path / "x", "nvfp4-modelopt", beside=False)
    more, _ = S.linear(S.fp8_tensor, f"{ATTENTION}.o_proj", 128, 128, inputs=0.5)
    S.save(tmp_path / "in", tensors | more, S.MODELOPT, count=2, i=128, h=128)
    with pytest.raises(moe_ckpt.FormatError, match="experts gate_proj/up_proj: has no input scale"):
        moe_ckpt.make_plan(tmp_path / "in", format="fp8-tensor", quantize="linear")


# Refusals

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


# Hostile

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
