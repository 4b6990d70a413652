"""Scales of an FP8 KV cache: from statistics, or carried over."""

from __future__ import annotations

import json
import shutil

import pytest
from kit.expert_layouts import load
from kit.files import FIXTURES, read_json, write_headers

import moe_ckpt
from moe_ckpt import StatsError, UsageError

SOURCE = FIXTURES / "qwen3_moe" / "source"


@pytest.fixture
def stats(tmp_path):
    """Statistics with an output amax for every k_proj and v_proj, each its own."""
    top = read_json(FIXTURES / "qwen3_moe" / "stats.json")
    for layer in (0, 1):
        for number, leaf in enumerate(("k_proj", "v_proj")):
            entry = top["modules"].setdefault(f"model.layers.{layer}.self_attn.{leaf}", {})
            entry["output_amax"] = 448.0 * (1 + 2 * layer + number)
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(top))
    return path


NAMES = {"modelopt": ("k_proj.k_scale", "v_proj.v_scale"), "compressed-tensors": None}


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_scales_are_output_amax_over_448(tmp_path, stats, dialect):
    out = tmp_path / "out"
    moe_ckpt.convert(SOURCE, out, stats=[stats], kv_cache="fp8", dialect=dialect)
    found = {name: t for name, t in load(out).items() if name.endswith(("k_scale", "v_scale"))}
    values = {name: float(tensor) for name, tensor in found.items()}
    k, v = ("k_proj.k_scale", "v_proj.v_scale") if dialect == "modelopt" else ("k_scale", "v_scale")
    assert values == {
        f"model.layers.{layer}.self_attn.{name}": 1.0 + 2 * layer + number
        for layer in (0, 1)
        for number, name in enumerate((k, v))
    }
    config = read_json(out / "config.json")["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)
    if dialect == "modelopt":
        nested = read_json(out / "hf_quant_config.json")["quantization"]
        assert nested["kv_cache_quant_algo"] == "FP8"


def test_never_by_default(tmp_path, stats):
    moe_ckpt.convert(SOURCE, tmp_path / "out", stats=[stats])
    assert not any(name.endswith(("k_scale", "v_scale")) for name in load(tmp_path / "out"))
    text = (tmp_path / "out" / "config.json").read_text()
    assert "kv_cache" not in text


def test_the_larger_of_two_files_counts(tmp_path, stats):
    top = read_json(stats)
    name = "model.layers.0.self_attn.k_proj"
    top["modules"] = {name: {"output_amax": 896.0}}
    (tmp_path / "more.json").write_text(json.dumps(top))
    moe_ckpt.convert(
        SOURCE, tmp_path / "out", stats=[stats, tmp_path / "more.json"], kv_cache="fp8"
    )
    assert float(load(tmp_path / "out")[f"{name}.k_scale"]) == 2.0


def test_statistics_without_outputs_are_refused(stats):
    top = read_json(stats)
    del top["modules"]["model.layers.1.self_attn.v_proj"]["output_amax"]
    top["modules"]["model.layers.0.self_attn.k_proj"]["output_amax"] = 0
    stats.write_text(json.dumps(top))
    with pytest.raises(StatsError) as caught:
        moe_ckpt.make_plan(SOURCE, stats=[stats], kv_cache="fp8")
    assert len(caught.value.problems) == 2
    assert "layers.1.self_attn.v_proj: has no output_amax" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "fp8-block"}, "dialect fp8 has no KV cache scheme"),
        ({"format": "bf16"}, "dialect none has no KV cache scheme"),
    ],
)
def test_dialects_without_a_scheme_refuse(stats, options, words):
    source = FIXTURES / "qwen3_moe_wide" / "source"
    with pytest.raises(UsageError, match=words):
        moe_ckpt.make_plan(source, stats=[stats], kv_cache="fp8", **options)


def scales_of(tmp_path, model_type, linears, covered, amax=896.0):
    """The scales of a small model with these layers, of which these have statistics."""
    tensors = {f"{name}.weight": ("BF16", [32, 32]) for name in linears}
    nemotron = model_type == "nemotron_h"
    up, experts = ("up_proj", "mixer") if nemotron else ("gate_up_proj", "mlp")
    experts = f"model.layers.0.{experts}.experts"
    tensors |= {f"{experts}.{up}": ("BF16", [2, 32 if nemotron else 64, 32])}
    tensors |= {f"{experts}.down_proj": ("BF16", [2, 32, 32])}
    config = {"model_type": model_type, "num_hidden_layers": 1, "hidden_size": 32}
    config |= {"n_routed_experts": 2} if nemotron else {"num_experts": 2}
    config |= {"moe_intermediate_size": 32}
    write_headers(tmp_path / "in", {"m.safetensors": tensors}, config)
    modules = {f"{covered}.{x}_proj": {"input_amax": 1.0, "output_amax": amax} for x in "kv"}
    top = {"schema": "moe-ckpt/stats", "version": 1, "modules": modules}
    (tmp_path / "s.json").write_text(json.dumps(top))
    options = {"stats": [tmp_path / "s.json"], "missing_stats": "constant", "kv_cache": "fp8"}
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", **options)
    found = load(tmp_path / "out")
    return {name: float(t) for name, t in found.items() if name.endswith(("k_scale", "v_scale"))}


def test_only_attention_of_the_model_itself_has_a_kv_cache_of_ours(tmp_path):
    """Not what stays whole, such as the layer for multi-token prediction; not keys alone."""
    parents = ("model.layers.0.self_attn", "model.layers.1.self_attn", "mtp.layers.0.self_attn")
    names = [f"{parent}.{leaf}_proj" for parent in parents for leaf in "qkv"]
    names += ["model.layers.0.index.k_proj", "model.layers.1.eh_proj"]
    assert scales_of(tmp_path, "qwen3_moe", names, parents[0]) == {
        "model.layers.0.self_attn.k_proj.k_scale": 2.0,
        "model.layers.0.self_attn.v_proj.v_scale": 2.0,
    }


def test_scales_have_the_names_that_runtimes_give_to_the_attention(tmp_path):
    """transformers saves these layers under another prefix than runtimes read."""
    mixer = "model.layers.0.mixer"
    names = [f"{mixer}.{leaf}_proj" for leaf in "qkv"]
    assert scales_of(tmp_path, "nemotron_h", names, mixer) == {
        "backbone.layers.0.mixer.k_proj.k_scale": 2.0,
        "backbone.layers.0.mixer.v_proj.v_scale": 2.0,
    }
    assert "backbone.layers.0.mixer.k_proj.weight" in load(tmp_path / "out")


def test_a_scale_is_never_subnormal(tmp_path):
    """Loaders invert it."""
    parent = "model.layers.0.self_attn"
    names = [f"{parent}.{leaf}_proj" for leaf in "qkv"]
    found = scales_of(tmp_path, "qwen3_moe", names, parent, amax=1e-37)
    assert list(found.values()) == [2.0**-126] * 2


def test_a_model_without_k_and_v_is_refused(stats):
    with pytest.raises(moe_ckpt.LayoutError, match="no attention with k_proj and v_proj"):
        moe_ckpt.make_plan(
            FIXTURES / "deepseek_v3" / "source", stats=[stats], kv_cache="fp8", format="fp8-channel"
        )


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_what_the_source_has_passes_through(tmp_path, stats, dialect):
    one, two = tmp_path / "one", tmp_path / "two"
    moe_ckpt.convert(SOURCE, one, stats=[stats], kv_cache="fp8")
    moe_ckpt.convert(one, two, dialect=dialect)
    first, second = load(one), load(two)
    scales = [name for name in first if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 4
    for name in scales:
        if dialect == "compressed-tensors":  # it has them at the attention itself
            other = name.replace(".k_proj", "").replace(".v_proj", "")
            assert name not in second
        else:
            other = name
        assert float(second[other]) == float(first[name])
    back = tmp_path / "back"
    moe_ckpt.convert(two, back, dialect="modelopt")
    assert {n: float(t) for n, t in load(back).items() if n in scales} == {
        n: float(first[n]) for n in scales
    }
    assert read_json(two / "config.json")["quantization_config"]["kv_cache_scheme"]
    shutil.rmtree(two)
    with pytest.raises(moe_ckpt.LayoutError, match="has scales of the KV cache already"):
        moe_ckpt.convert(one, two, stats=[stats], kv_cache="fp8")


@pytest.mark.parametrize("number_format", ["fp8-block", "bf16"])
def test_where_the_dialect_has_no_scheme_the_scales_go_too(tmp_path, number_format):
    wide = FIXTURES / "qwen3_moe_wide"
    top = read_json(wide / "stats.json")
    for layer in range(read_json(wide / "source" / "config.json")["num_hidden_layers"]):
        for leaf in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{leaf}"
            top["modules"].setdefault(name, {})["output_amax"] = 448.0
    (tmp_path / "stats.json").write_text(json.dumps(top))
    one, two = tmp_path / "one", tmp_path / "two"
    stats = [tmp_path / "stats.json"]
    moe_ckpt.convert(wide / "source", one, stats=stats, kv_cache="fp8")
    plan = moe_ckpt.make_plan(one, format=number_format)
    assert any("has no FP8 KV cache" in note for note in plan.notes)
    moe_ckpt.convert(one, two, format=number_format)
    assert not any(name.endswith(("k_scale", "v_scale")) for name in load(two))
    assert "kv_cache" not in (two / "config.json").read_text()
