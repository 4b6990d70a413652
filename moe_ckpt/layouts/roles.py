"""What the tensors outside the routed experts are, told from their names and ranks.

A linear layer is a module with a 2-D floating-point ``weight`` that no rule below sets aside.
The rules are those of ModelOpt's default configuration (default_disabled_quantizers.yaml, and
quant_utils.py, _get_unquantized_moe_router_names), with three differences: multi-token
prediction is recognised by layer number as well; audio towers stay as vision towers do; and so
does DeepSeek's sparse-attention indexer, of which vLLM builds a part unquantized always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass

__all__ = ["Aside", "amax_groups", "have_one_scale", "is_matrix", "is_multi_token", "module_of"]
__all__ += ["reason_to_keep", "set_aside"]

_LAYER = re.compile(r"(.+?)\.([0-9]{1,9})\.")

_MTP = "multi-token prediction"
_TOWER = "vision or audio part"
_SPEECH = "speech generation part"

# Whole parts of a model that stay as they are, their experts included.
_SET_ASIDE = {
    **dict.fromkeys("mtp mtp_layers mtp_block eh_proj".split(), _MTP),
    **dict.fromkeys(
        "visual vision_tower vision_model vision_encoder vision_embed_tokens embed_vision audio "
        "audio_tower audio_encoder audio_model embed_audio multi_modal_projector mm_projector "
        "patch_merge_mlp resampler_model projector vit_large_projector vision vit sam_model "
        "qwen2_model vision_adapter vision_projection vision_language_adapter patch_merger".split(),
        _TOWER,
    ),
    **dict.fromkeys("talker code2wav code_predictor token2wav".split(), _SPEECH),
}

# Modules that look like linear layers and stay as they are.
_KEEP: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("output head", re.compile(r"(^|\.)(lm_head|output_layer|unembed|proj_out|output|score)$")),
    ("embedding", re.compile(r"embed|(^|\.)(wte|wpe)$")),
    ("router", re.compile(r"(^|\.)(gate|wg|\w*router\w*|shared_expert_gate)(\.|$)")),
    ("norm", re.compile(r"norm\w*$")),
    ("convolution", re.compile(r"conv(1d)?$")),
    ("linear attention", re.compile(r"(^|\.)linear_attn\.in_proj_(a|b|ba)$")),
    ("sparse attention indexer", re.compile(r"(^|\.)indexer\.")),
)

# Linear layers under one parent that read the same input: ModelOpt gives them one weight scale
# and one input scale, and runtimes fuse some of them and keep only one.
_SHARED_INPUTS: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    (
        # longcat_flash has self_attn.0 and self_attn.1; of nemotron_h every layer is a mixer
        re.compile(r"(attn|attention|mixer)(\.\d+)?$"),
        frozenset(
            "q_proj k_proj v_proj qkv_proj q_a_proj kv_a_proj_with_mqa g_proj gate_proj "
            "linear_gate output_gate b_proj f_a_proj g_a_proj".split()
        ),
    ),
    (re.compile(r"linear_attn$"), frozenset({"in_proj_qkv", "in_proj_z"})),
    (re.compile(r""), frozenset({"gate_proj", "linear_gate", "up_proj"})),
    (re.compile(r""), frozenset({"w1", "w3"})),
    (re.compile(r""), frozenset({"input_mix_weight_down", "block_inject_weight"})),  # qwen4_exp
    (re.compile(r"ple$"), frozenset({"key_proj", "value_proj"})),  # qwen4_exp
)


# Those of them that runtimes take for parts of one matrix that was cut, so that SGLang has more
# places for scales than there are matrices: one scale, whatever ModelOpt's formats do elsewhere.
_ONE_SCALE = frozenset({"in_proj_qkv", "in_proj_z"})


@dataclass(frozen=True, slots=True)
class Aside:
    """A part of the model that is copied whole, and why."""

    prefix: str
    reason: str


def module_of(tensor: str) -> str:
    """The module that owns a tensor: its name without the last component.

    >>> module_of("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return tensor.rpartition(".")[0]


def is_matrix(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor could be the weight of a linear layer."""
    return tensor.endswith(".weight") and len(shape) == 2 and all(shape)


def set_aside(name: str, stacks: Set[str], num_layers: int | None) -> Aside | None:
    """The part of the model that is copied whole and holds this tensor or module, if one does.

    ``stacks`` are the paths that hold layers with experts, such as ``model.layers``: layers there
    numbered ``num_layers`` and up are multi-token prediction (DeepSeek-V3, GLM, Step).

    >>> set_aside("model.visual.blocks.0.attn.qkv", {"model.layers"}, 61)
    Aside(prefix='model.visual', reason='vision or audio part')
    >>> set_aside("model.layers.61.mlp.gate", {"model.layers"}, 61)
    Aside(prefix='model.layers.61', reason='multi-token prediction')
    """
    path = name.split(".")
    for depth, component in enumerate(path, 1):
        if component in _SET_ASIDE:
            return Aside(".".join(path[:depth]), _SET_ASIDE[component])
    layer = _layer_beyond(name, stacks, num_layers)
    return Aside(layer, _MTP) if layer else None


def is_multi_token(
    name: str, stacks: Set[str] = frozenset(), num_layers: int | None = None
) -> bool:
    """Whether a name is of multi-token prediction; whatever its layer, without the last two.

    >>> is_multi_token("model.mtp.layers.0.enorm.weight"), is_multi_token("model.layers.61.enorm")
    (True, False)
    >>> is_multi_token("model.layers.61.enorm.weight", {"model.layers"}, 61)
    True
    """
    if _layer_beyond(name, stacks, num_layers):
        return True
    return any(_SET_ASIDE.get(component) == _MTP for component in name.split("."))


def _layer_beyond(name: str, stacks: Set[str], num_layers: int | None) -> str:
    """The layer of a name, if it comes after the ordinary ones; '' if not."""
    layer = _LAYER.match(name)
    if layer and num_layers is not None and layer[1] in stacks and int(layer[2]) >= num_layers:
        return f"{layer[1]}.{layer[2]}"
    return ""


def reason_to_keep(module: str) -> str | None:
    """Why a module with a 2-D weight is not quantized as a linear layer; None if it may be."""
    for reason, pattern in _KEEP:
        if pattern.search(module):
            return reason
    return None


def amax_groups(modules: Iterable[tuple[str, int]]) -> list[tuple[str, ...]]:
    """Partition linear layers, given with their columns K, into those that read the same input.

    >>> amax_groups([("attn.q_proj", 64), ("attn.o_proj", 32), ("attn.v_proj", 64)])
    [('attn.q_proj', 'attn.v_proj'), ('attn.o_proj',)]
    """
    groups: dict[object, list[str]] = {}
    for module, columns in modules:
        parent, _, leaf = module.rpartition(".")
        key: object = module
        for pattern, leaves in _SHARED_INPUTS:
            if leaf in leaves and pattern.search(parent):
                key = (parent, leaves, columns)
                break
        groups.setdefault(key, []).append(module)
    return [tuple(group) for group in groups.values()]


def have_one_scale(modules: Iterable[str]) -> bool:
    """Whether linear layers share a scale in every format that has one for a matrix.

    >>> have_one_scale(["l.0.linear_attn.in_proj_qkv", "l.0.linear_attn.in_proj_z"])
    True
    >>> have_one_scale(["l.0.self_attn.q_proj", "l.0.self_attn.k_proj"])
    False
    """
    return {module.rpartition(".")[2] for module in modules} == _ONE_SCALE
