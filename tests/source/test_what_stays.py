"""Parts of a quantized source that the conversion does not touch: what they become, and say."""

from __future__ import annotations

import json

import pytest
import torch
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import load
from kit.files import read_json, read_tensors
from kit.quantized_sources import ATTENTION, bits, make, only

import moe_ckpt


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
