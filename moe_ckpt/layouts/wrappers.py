"""Models around a text model of another family: most of them see, some hear.

Their config.json names the text model in a part of its own, and that model's row counts: how its
experts are stored does not change. What changes is the beginning of names, and which runtimes have
the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..runtimes import SGLANG, TRANSFORMERS, VLLM
from .family import Family
from .sizes import model_type_of
from .table import find_family

__all__ = ["TEXT_CONFIGS", "WRAPPERS", "Wrapper", "family_of_config", "text_types_of"]

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True)
class Wrapper:
    """Model types around a text model; the fields are those of `Family`.

    ``beneath``: what stands before the text model's own ``model.`` or ``backbone.``.
    ``runtimes``: which have the wrapper; they read the result if they read the text model.
    """

    model_types: tuple[str, ...]
    beneath: tuple[str, ...] = ("language_model.",)
    prefixes: tuple[tuple[str, str], ...] = ()
    not_restorable: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = (VLLM, SGLANG)


# What transformers 5 writes with save_original_format=False, and releases have.
_AS_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
)

WRAPPERS: tuple[Wrapper, ...] = (
    Wrapper(("mistral3",), prefixes=_AS_LLAVA, runtimes=(VLLM, SGLANG, TRANSFORMERS)),
    Wrapper(("internvl",), prefixes=_AS_LLAVA, runtimes=(VLLM, TRANSFORMERS)),
    Wrapper(("internvl_chat", "kimi_vl")),
    Wrapper(("NemotronH_Nano_VL_V2", "NemotronH_Nano_Omni_Reasoning_V3")),
)
# A config.json without a model type: its own code says how it is built, or nobody does.
_UNNAMED = Wrapper(("",), ("language_model.", "language.", ""), runtimes=())


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """The row of the table for a model, or for the text model in it."""
    model_type = model_type_of(config)
    family = find_family(model_type)
    wrapper = next((each for each in WRAPPERS if model_type in each.model_types), None)
    if "model_type" not in config:
        wrapper = _UNNAMED
    if family is not None:
        return _as_saved(family, config)
    if wrapper is None:
        return None
    named = text_types_of(config)
    found = ((name, family) for name in named if (family := find_family(name)) is not None)
    name, family = next(found, ("", None))
    return None if family is None else _within(wrapper, family, model_type or name)


def text_types_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model types of the text models that a config.json holds."""
    parts = (config.get(key) for key in TEXT_CONFIGS)
    found = (model_type_of(part) for part in parts if isinstance(part, dict))
    return tuple(name for name in found if name)


def _as_saved(family: Family, config: Mapping[str, Any]) -> Family:
    """A family for the class that this config names: transformers alone knows its own."""
    named = config.get("architectures")
    if not family.released_as or not isinstance(named, list) or not named:
        return family
    if any(name in family.released_as for name in named):
        return family
    kept = tuple(name for name in family.runtimes if name == TRANSFORMERS)
    return replace(family, runtimes=kept, in_tensorrt_llm=())


def _within(wrapper: Wrapper, family: Family, model_type: str) -> Family:
    """A family as the text model of a wrapper."""
    own = [root.replace("model.language_model.", "model.") for root in family.roots]
    roots = dict.fromkeys(beneath + root for beneath in wrapper.beneath for root in own)
    return replace(
        family,
        model_types=(model_type,),
        roots=tuple(roots),
        prefixes=wrapper.prefixes,
        not_restorable=(*family.not_restorable, *wrapper.not_restorable),
        runtimes=tuple(name for name in family.runtimes if name in wrapper.runtimes),
        in_tensorrt_llm=(),
        fused_runtimes={},
        in_transformers=TRANSFORMERS in wrapper.runtimes and family.in_transformers,
    )
