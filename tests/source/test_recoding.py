"""Quantized sources whose codes and scales can be kept: the same numbers, spelled otherwise."""

from __future__ import annotations

import pytest
import torch
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import load
from kit.files import FIXTURES, read_json, read_tensors
from kit.quantized_sources import ATTENTION, BUDGETS, CUTS, bits, gpt_oss, make, only, refused, same

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.verify import verify
from moe_ckpt.work.batches import Budget


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


UE8M0 = S.FP8 | {"scale_fmt": "ue8m0"}


def powers_of_two(dtype):
    """FP8 blocks whose scales are E8M0, or the same numbers as float32."""
    tensors, _ = S.experts(S.fp8_block, 2, 128, 256, dtype="F8_E8M0")
    if dtype == "F32":
        return {n: t.float() if n.endswith("_inv") else t for n, t in tensors.items()}
    return tensors


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_what_runtimes_act_on_stays_with_the_scales(tmp_path, dtype):
    tensors = powers_of_two(dtype)
    S.save(tmp_path / "in", tensors, UE8M0, count=2, i=128, h=256)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", format="fp8-block")
    same(load(tmp_path / "out"), tensors)
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert said["scale_fmt"] == "ue8m0"
    found = verify(tmp_path / "out", source=tmp_path / "in")
    assert not found.found


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_with_a_scale_made_anew_nothing_is_said_of_powers_of_two(tmp_path, dtype):
    """And all scales are of one dtype."""
    tensors = powers_of_two(dtype) | {f"{ATTENTION}.o_proj.weight": torch.ones(128, 128).bfloat16()}
    S.save(tmp_path / "in", tensors, UE8M0, count=2, i=128, h=256)
    plan = moe_ckpt.convert(
        tmp_path / "in", tmp_path / "out", format="fp8-block", quantize="linear"
    ).plan
    assert "scale_fmt" not in read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert any(note.startswith("scale_fmt ue8m0 of the source is left out") for note in plan.notes)
    found = load(tmp_path / "out")
    scales = {name: t for name, t in found.items() if name.endswith("_inv")}
    assert {t.dtype for t in scales.values()} == {torch.float32}
    for name in scales.keys() & tensors.keys():
        assert torch.equal(scales[name], tensors[name].float())


def test_what_is_said_of_experts_is_replaced(tmp_path):
    """Of DeepSeek-V4 vLLM takes experts to be FP4 where the config does not say what they are."""
    tensors, _ = S.experts(
        S.mxfp4, 2, 128, 128, module="layers.0.ffn.experts", ending=".scale", dtype="F8_E8M0"
    )
    for old, new in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    sizes = {"count": 2, "i": 128, "h": 128, "model_type": "deepseek_v4", "expert_dtype": "fp4"}
    S.save(tmp_path / "in", tensors, S.FP8, **sizes)
    for name, said in {"fp8-block": "fp8", "nvfp4": None}.items():
        moe_ckpt.convert(tmp_path / "in", tmp_path / name, format=name, experts="split")
        assert read_json(tmp_path / name / "config.json").get("expert_dtype") == said
