"""Keys of config.json that runtimes ask for, and that transformers 5 leaves out when it saves.

transformers knows of a model type what its class does; runtimes, which share one class among
several, ask config.json. Where the rest of it, or which tensors there are, tells the value, the
key is restored; else the user is told. What each runtime asks for is from the code of its models
(vLLM 0.33, SGLang 0.5.23), what the value is from that of transformers' modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..runtimes import SGLANG, VLLM
from .sizes import EXPERTS_KEYS, model_type_of
from .wrappers import TEXT_CONFIGS

__all__ = ["CompletedConfig", "Key", "complete_config"]

_BIAS = ".e_score_correction_bias"
_SIGMOID_V3 = ("deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa", "glm4_moe_lite")
_AS_DEEPSEEK = ("deepseek_v2", *_SIGMOID_V3)
_QWEN = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True, slots=True)
class Model:
    """The part of config.json that has the experts, and the names of the model's tensors."""

    config: Mapping[str, Any]
    names: Collection[str]

    def has(self, part: str) -> bool:
        """Whether a tensor's name has this part."""
        return any(part in name for name in self.names)

    def layers(self, key: str) -> list[str]:
        """The words that a key has for the layers; none if it has no list of words."""
        found = self.config.get(key)
        return found if isinstance(found, list) and all(type(w) is str for w in found) else []


@dataclass(frozen=True, slots=True)
class Key:
    """A key that the config of some model types needs.

    ``value`` is of a `Model` that lacks the key: None if it is not needed there, and `UNKNOWN`
    if nothing tells it. ``part`` is where the key belongs: '' beside the experts' sizes. ``stops``:
    runtimes that were seen to stop without it.
    """

    name: str
    model_types: tuple[str, ...]
    value: Callable[[Model], Any]
    runtimes: str = "vLLM and SGLang ask"
    part: str = ""
    stops: tuple[str, ...] = ()


UNKNOWN = object()


def _always(value: Any) -> Callable[[Model], Any]:
    return lambda _: value


def _with(part: str, value: Any) -> Callable[[Model], Any]:
    return lambda model: value if model.has(part) else None


def _interval(model: Model) -> Any:
    """n where layers n - 1, 2n - 1, ... are those with full attention."""
    full = [word == "full_attention" for word in model.layers("layer_types")]
    n = full.index(True) + 1 if True in full else len(full) + 1
    fits = full and full == [(layer + 1) % n == 0 for layer in range(len(full))]
    return n if fits else UNKNOWN


def _first_dense(model: Model) -> Any:
    """How many layers come before those with experts, where all later ones have them."""
    if "first_k_dense_replace" in model.config:
        return model.config["first_k_dense_replace"]
    kinds = model.layers("mlp_layer_types")
    dense = kinds.index("sparse") if "sparse" in kinds else 0
    return dense if kinds and "dense" not in kinds[dense:] else UNKNOWN


def _layer_freq(model: Model) -> Any:
    return 1 if _first_dense(model) is not UNKNOWN else UNKNOWN


def _rotary_dim(model: Model) -> Any:
    rope, head_dim = model.config.get("rope_parameters"), model.config.get("head_dim")
    if not isinstance(rope, dict) or type(head_dim) is not int:
        return UNKNOWN
    factor = rope.get("partial_rotary_factor", 1.0)
    is_share = type(factor) in (int, float) and 0 < factor <= 1
    return int(head_dim * factor) if is_share else UNKNOWN


def _width(model: Model) -> Any:
    return model.config.get("moe_intermediate_size", UNKNOWN)


def _deepstack(model: Model) -> Any:
    """The layers of a vision part whose output the text model reads early: none in Qwen3.5."""
    return UNKNOWN if model.has(".deepstack_merger_list.") else []


def _block_types(model: Model) -> Any:
    """The older words for the kinds of layers."""
    older = {"full_attention": "attention", "linear_attention": "mamba"}
    return [older.get(word, word) for word in model.layers("layer_types")] or UNKNOWN


def _moe_layers(model: Model) -> Any:
    return [kind == "sparse" for kind in model.layers("mlp_layer_types")] or UNKNOWN


KEYS: tuple[Key, ...] = (
    Key("full_attention_interval", _QWEN, _interval, "SGLang asks", stops=(SGLANG,)),
    Key(
        "deepstack_visual_indexes",
        ("qwen3_5_moe",),
        _deepstack,
        "SGLang asks",
        part="vision_config",
    ),
    Key("topk_method", _SIGMOID_V3, _with(_BIAS, "noaux_tc"), stops=(VLLM, SGLANG)),
    Key("scoring_func", _SIGMOID_V3, _always("sigmoid"), stops=(SGLANG,)),
    Key("scoring_func", ("deepseek_v2",), _always("softmax"), "SGLang asks"),
    Key("first_k_dense_replace", (*_AS_DEEPSEEK, "hy_v3"), _first_dense, stops=(VLLM, SGLANG)),
    Key("moe_layer_freq", _AS_DEEPSEEK, _layer_freq, "SGLang asks", stops=(SGLANG,)),
    Key("scoring_func", ("minimax_m2",), _always("sigmoid")),
    Key("use_routing_bias", ("minimax_m2",), _with(_BIAS, True)),
    Key("use_qk_norm", ("minimax_m2",), _with(".q_norm.", True), "SGLang asks"),
    Key("rotary_dim", ("minimax_m2",), _rotary_dim),
    Key("score_func", ("afmoe",), _always("sigmoid")),
    Key("route_norm", ("afmoe", "hy_v3"), _always(True)),
    Key("n_group", ("afmoe",), _always(1), "vLLM asks"),
    Key("topk_group", ("afmoe",), _always(1), "vLLM asks"),
    Key("qk_norm", ("hy_v3",), _with(".q_norm.", True)),
    Key("expert_hidden_dim", ("hy_v3",), _width, "vLLM asks"),
    Key("layers_block_type", ("granitemoehybrid",), _block_types, "SGLang asks"),
    Key("is_moe_layer", ("exaone_moe",), _moe_layers, "SGLang asks"),
)


@dataclass(frozen=True, slots=True)
class CompletedConfig:
    """A config.json with the keys that were missing, and what to say of them.

    ``missing``: all of them.
    """

    config: Mapping[str, Any]
    missing: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def complete_config(config: Mapping[str, Any], names: Collection[str]) -> CompletedConfig:
    """Add the keys that runtimes ask for and that follow from the rest.

    Args:
        config: the source's config.json.
        names: of the source's tensors.
    """
    text = _where(config)
    notes: list[str] = []
    unknown: list[str] = []
    missing: list[Key] = []
    whole = config
    for key in KEYS:
        at = key.part or text
        part = config.get(at) if at else config
        if not isinstance(part, Mapping) or part.get(key.name) is not None:
            continue
        model_types = (model_type_of(config), "" if key.part else model_type_of(part))
        if not any(model_type in key.model_types for model_type in model_types):
            continue
        value = key.value(Model(part, names))
        if value is not None:
            missing.append(key)
        if value is UNKNOWN:
            unknown.append(f"{key.name} ({key.runtimes} for it)")
        elif value is not None:
            notes.append(f"{key.name} {json.dumps(value)}")
            whole = _put(whole, at, key.name, value)
    told = (
        f"config.json lacks {', '.join(unknown)}, and the rest does not tell its value; take it "
        "from the config.json of the release"
    )
    return CompletedConfig(
        whole,
        tuple(missing),
        (f"config.json gets back keys that runtimes ask for: {', '.join(notes)}",) * bool(notes),
        (told,) * bool(unknown),
    )


def _where(config: Mapping[str, Any]) -> str:
    """The key of the part with the experts, '' if they are not in a part."""
    for key in TEXT_CONFIGS:
        part = config.get(key)
        if isinstance(part, Mapping) and any(part.get(name) for name in EXPERTS_KEYS):
            return key
    return ""


def _put(config: Mapping[str, Any], at: str, name: str, value: Any) -> Mapping[str, Any]:
    return {**config, at: _put(config[at], "", name, value)} if at else {**config, name: value}
