"""What the tensors outside the routed experts are, told from their names and ranks.

A linear layer is a module with a 2-D floating-point ``weight`` that no rule below sets aside.
The rules are those of ModelOpt's default configuration (default_disabled_quantizers.yaml, and
quant_utils.py, _get_unquantized_moe_router_names), with multi-token prediction recognised by
layer number as well, and without DeepSeek's sparse-attention indexer, which vLLM builds
unquantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .dtypes import FLOATS

__all__ = ["amax_groups", "is_matrix", "module_of", "reason_to_keep", "reason_to_set_aside"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")

# Whole parts of a model that stay as they are, their experts included.
_SET_ASIDE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("multi-token prediction", re.compile(r"(^|\.)(mtp|model\.mtp)\w*\.|(^|\.)eh_proj(\.|$)")),
    (
        "vision or audio part",
        re.compile(
            r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|embed_vision|audio|audio_tower"
            r"|audio_encoder|embed_audio|multi_modal_projector|mm_projector|patch_merge_mlp"
            r"|vision_embed_tokens|resampler_model|projector)\."
        ),
    ),
    ("speech generation part", re.compile(r"^(talker|code2wav|code_predictor|token2wav)\.")),
)

# Modules that look like linear layers and stay as they are.
_KEEP: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("output head", re.compile(r"(^|\.)(lm_head|output_layer|unembed|proj_out|output|score)$")),
    ("embedding", re.compile(r"(^|\.)(\w*embed(ding)?s?(_tokens|_in|_out)?|wte|wpe)$")),
    ("router", re.compile(r"(^|\.)(gate|wg|\w*router\w*|shared_expert_gate)(\.|$)")),
    ("norm", re.compile(r"norm\w*$")),
    ("convolution", re.compile(r"conv(1d)?$")),
    ("linear attention", re.compile(r"(^|\.)linear_attn\.in_proj_(a|b|ba)$")),
    ("sparse attention indexer", re.compile(r"(^|\.)indexer\.")),
)

# Linear layers under one parent that read the same input: loaders fuse them, so they must have
# one weight scale and one input scale.
_ATTENTION_INPUTS = frozenset(
    "q_proj k_proj v_proj q_a_proj kv_a_proj_with_mqa g_proj gate_proj".split()
)
_SHARED_INPUTS: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    (re.compile(r"attn$|attention$"), _ATTENTION_INPUTS),
    (re.compile(r"linear_attn$"), frozenset({"in_proj_qkv", "in_proj_z"})),
    (re.compile(r""), frozenset({"gate_proj", "up_proj"})),
    (re.compile(r""), frozenset({"w1", "w3"})),
)


def module_of(tensor: str) -> str:
    """The module that owns a tensor: its name without the last component.

    >>> module_of("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return tensor.rpartition(".")[0]


def is_matrix(tensor: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor could be the weight of a linear layer."""
    return tensor.endswith(".weight") and len(shape) == 2 and dtype in FLOATS and all(shape)


def reason_to_set_aside(name: str, num_layers: int | None) -> str | None:
    """Why a whole part of the model, experts included, is copied; None if it is not.

    Layers numbered ``num_layers`` and up hold multi-token prediction (DeepSeek-V3, GLM, Step).
    """
    for reason, pattern in _SET_ASIDE:
        if pattern.search(name):
            return reason
    layer = _LAYER.search(name)
    if layer and num_layers is not None and int(layer[1]) >= num_layers:
        return "multi-token prediction"
    return None


def reason_to_keep(module: str) -> str | None:
    """Why a module with a 2-D weight is not quantized as a linear layer; None if it may be."""
    for reason, pattern in _KEEP:
        if pattern.search(module):
            return reason
    return None


def amax_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Partition linear layers into those that read the same input, in order of appearance.

    >>> amax_groups(["a.self_attn.q_proj", "a.self_attn.o_proj", "a.self_attn.v_proj"])
    [('a.self_attn.q_proj', 'a.self_attn.v_proj'), ('a.self_attn.o_proj',)]
    """
    groups: dict[object, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        key: object = module
        for pattern, leaves in _SHARED_INPUTS:
            if leaf in leaves and pattern.search(parent):
                key = (parent, leaves)
                break
        groups.setdefault(key, []).append(module)
    return [tuple(group) for group in groups.values()]
