"""Choices of what is quantized, of a small imaginary model, for tests of dialects."""

from __future__ import annotations

from moe_ckpt.dialects import Assignment, QuantizedExperts

LAYERS = range(12)


def experts(layer, prefix="model", block="mlp", names=("gate_proj", "up_proj", "down_proj")):
    return QuantizedExperts(f"{prefix}.layers.{layer}.{block}.experts", 0, 8, tuple(names))


def attention(layer, prefix="model"):
    return [f"{prefix}.layers.{layer}.self_attn.{p}_proj" for p in "qkvo"]


def shared(layer, prefix="model"):
    parent = f"{prefix}.layers.{layer}.mlp.shared_experts"
    return [f"{parent}.{p}_proj" for p in ("gate", "up", "down")]


def routers(prefix="model", block="mlp"):
    return [f"{prefix}.layers.{n}.{block}.gate" for n in LAYERS[1:]]


def dense(prefix="model"):
    return [f"{prefix}.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]


SET_ASIDE = {
    "mtp": ["mtp.layers.0.mlp.experts", "mtp.layers.0.mlp.gate", "mtp.layers.0.self_attn.o_proj"],
    "model.layers.12": ["model.layers.12.eh_proj", "model.layers.12.mlp.experts"],
    "model.visual": ["model.visual.blocks.0.attn.qkv", "model.visual.merger.proj"],
}


def every(of, layers=LAYERS, **more):
    return [module for layer in layers for module in of(layer, **more)]


def experts_only(format_name, prefix="model", block="mlp", **more):
    """All experts; attention, shared experts, routers and the first layer stay."""
    return Assignment(
        {format_name: [experts(n, prefix, block, **more) for n in LAYERS[1:]]},
        {},
        [
            *every(attention, prefix=prefix),
            *every(shared, LAYERS[1:], prefix=prefix),
            *routers(prefix, block),
            *dense(prefix),
            "lm_head",
        ],
        SET_ASIDE,
    )


def all_linears(format_name):
    linears = [*every(attention), *every(shared, LAYERS[1:]), *dense()]
    return Assignment(
        {format_name: [experts(n) for n in LAYERS[1:]]},
        {format_name: linears},
        [*routers(), "lm_head"],
        SET_ASIDE,
    )


def mixed(of_experts, of_attention, kept_layers=2, shared_format=None):
    """Experts of the last layers, attention of all; the experts of the first layers stay."""
    quantized = LAYERS[1 + kept_layers :]
    kept = [experts(n).module for n in LAYERS[1 : 1 + kept_layers]]
    linears = {of_attention: every(attention)}
    loose = every(shared, LAYERS[1:])
    if shared_format:
        linears[shared_format] = [*linears.get(shared_format, []), *loose]
        loose = []
    return Assignment(
        {of_experts: [experts(n) for n in quantized]},
        linears,
        [*loose, *kept, *routers(), *dense(), "lm_head"],
        SET_ASIDE,
    )
