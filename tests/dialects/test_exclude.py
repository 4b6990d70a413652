"""The exclude list, under the matching rules of each runtime.

Three runtimes read ModelOpt's list. transformers, the fourth, has no quantizer of that name, so
it reads none: what is checked for it is that no single expert and no layer prefix is listed.
"""

from __future__ import annotations

import json

import pytest
from kit.files import FIXTURES

import moe_ckpt
from moe_ckpt.dialects.matching import UndecidedError, built_modules
from moe_ckpt.dialects.modelopt.exclude import exclude_list
from moe_ckpt.dialects.modelopt.match import sglang, trtllm, vllm

ALL = (vllm, sglang, trtllm)
QKV = tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")
FUSED_QKV = "model.layers.1.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("entries", "module", "by_vllm", "by_sglang", "by_trtllm"),
    [
        (["model.layers.1.mlp.gate"], "model.layers.1.mlp.gate", True, True, True),
        (["model.layers.1.mlp.gate"], "model.layers.10.mlp.gate", False, False, False),
        # a name without a dot behind it: layers 10 to 19 follow in vLLM
        (["model.layers.1"], "model.layers.10.mlp.gate", True, False, False),
        (["model.layers.1*"], "model.layers.10.mlp.gate", True, True, True),
        (["model.layers.1.*"], "model.layers.10.mlp.gate", False, False, False),
        (["model.layers.1.*"], "model.layers.1.mlp.experts", True, True, True),
        # vLLM looks for the text anywhere: a router's name is in gate_up_proj
        (["model.layers.1.mlp.gate"], "model.layers.1.mlp.gate_up_proj", True, False, False),
        (["*.mlp.gate"], "model.layers.1.mlp.gate_up_proj", False, False, False),
        (["*.mlp.gate"], "language_model.model.layers.1.mlp.gate", True, True, True),
        # one expert excludes its layer in vLLM
        (
            ["model.layers.1.mlp.experts.7.up_proj"],
            "model.layers.1.mlp.experts",
            True,
            False,
            False,
        ),
        # SGLang matches any one component
        (["gate"], "model.layers.1.mlp.gate", True, True, False),
        (
            ["model.layers.0.self_attn.q_b_proj"],
            "model.layers.9.self_attn.q_b_proj",
            False,
            True,
            False,
        ),
        (["mtp*"], "mtp.layers.0.mlp.experts", True, True, True),
        (["lm_head"], "language_model.lm_head", True, True, False),
        (["*lm_head"], "language_model.lm_head", True, True, True),
        (["*visual*"], "visual.blocks.0.attn.qkv", True, True, True),
    ],
)
def test_rules(entries, module, by_vllm, by_sglang, by_trtllm):
    found = [rule(entries)(module, (module,)) for rule in ALL]
    assert found == [by_vllm, by_sglang, by_trtllm]


def test_fused_modules_go_by_their_members():
    for rule in ALL:
        assert rule(QKV)(FUSED_QKV, QKV)
        assert not rule(["model.layers.1.self_attn.o_proj"])(FUSED_QKV, QKV)
        assert rule(["*.self_attn*"])(FUSED_QKV, QKV)
    for rule in (vllm, sglang):
        with pytest.raises(UndecidedError):
            rule(QKV[:2])(FUSED_QKV, QKV)


CASES = [
    (model, form, quantize)
    for model, form in [
        ("qwen3_moe", "source"),
        ("mixtral", "hub"),
        ("deepseek_v3", "source"),
        ("qwen2_moe", "source"),
    ]
    for quantize in ("experts", "linear")
]


@pytest.mark.parametrize(("model", "form", "quantize"), CASES)
@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("rename", [("", ""), ("model.", "language_model.model.")])
def test_excluded_is_what_has_no_scales(model, form, quantize, rule, rename):
    """Runtimes put other prefixes before the layers; full names are translated, patterns hold."""
    plan = moe_ckpt.make_plan(FIXTURES / model / form, format="nvfp4-w4a16", quantize=quantize)
    entries = json.loads(plan.files["config.json"])["quantization_config"]["ignore"]
    entries = [e if e.startswith("*") else e.replace(*rename, 1) for e in entries]
    names = {t.name: len(t.shape) for s in plan.shards for t in s.tensors}
    modules = {
        n.removesuffix(".weight")
        for n, rank in names.items()
        if n.endswith(".weight") and rank == 2
    }
    scaled = {module for module in modules if f"{module}.weight_scale" in names}
    linears = [m for m in modules if "embed" not in m and ".experts." not in m]
    experts = {m.partition(".experts.")[0] + ".experts" for m in modules if ".experts." in m}
    wanted = dict.fromkeys(experts, False)
    checked = {m: m in scaled for m in linears}
    for module, members in built_modules(linears).items():
        quantized = {checked[m] for m in members}
        assert len(quantized) == 1
        wanted[module] = not quantized.pop()
    assert set(wanted.values()) == {True, False}
    for module, excluded in wanted.items():
        renamed = module.replace(*rename, 1) if rename[0] else module
        members = built_modules(linears).get(module, (module,))
        members = tuple(m.replace(*rename, 1) if rename[0] else m for m in members)
        assert rule(entries)(renamed, members) is excluded, module


def test_parts_set_aside_are_patterns_and_single_experts_are_never_listed():
    entries = exclude_list(
        ["model.layers.0.mlp.experts"],
        ["model.layers.0.mlp.gate"],
        {
            "mtp": ["mtp.layers.0.mlp.experts"],
            "model.layers.61": ["model.layers.61.eh_proj"],
            "model.visual": ["model.visual.blocks.0.attn.qkv"],
        },
    )
    assert set(entries) == {
        *("*.mlp.gate", "*lm_head", "*visual*", "lm_head", "model.layers.0.mlp.gate"),
        *("model.layers.61.*", "model.visual*", "mtp*"),
    }
    assert entries == sorted(entries)


def test_experts_that_stay_are_excluded_under_any_prefix():
    entries = exclude_list(["model.layers.1.mlp.experts"], ["model.layers.0.mlp.experts"], {})
    patterns = [entry for entry in entries if entry.startswith("*")]
    for rule in ALL:
        for layer, excluded in ((0, True), (1, False), (10, False)):
            name = f"language_model.model.layers.{layer}.mlp.experts"
            assert rule(patterns)(name, (name,)) is excluded


def test_a_pattern_that_would_hit_something_quantized_gives_way_to_names():
    """A tower in an encoder that is quantized itself."""
    tower = "model.encoder.vision_tower"
    entries = exclude_list(
        ["model.encoder.layers.0.self_attn.o_proj", "model.audio_decoder.o_proj"],
        [],
        {tower: [f"{tower}.q"], "model.audio": ["model.audio.q"]},
    )
    assert set(entries) == {
        *("*lm_head", "*vision_tower*", "lm_head", f"{tower}*"),
        "model.audio.q",  # model.audio* would hit audio_decoder
    }
