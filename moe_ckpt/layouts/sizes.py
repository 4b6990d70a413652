"""The expert counts and sizes that a config.json names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import LayoutError
from ..source.strict_json import show_value

__all__ = ["Sizes", "announced_mtp", "levels_of", "listed", "model_type_of", "num_hidden_layers"]
__all__ += ["num_stacked_layers", "sizes_of"]

_SIZE_CAP = 2**31
_LIST_CAP = 10_000
_SHOWN = 6

# The key for one thing varies by family, and transformers 5 re-saves it under another name
# (qwen3_moe: num_experts becomes num_local_experts), so every known key counts.
EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
INTERMEDIATE_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
# The experts' width only where none of the above is named; else that of dense layers.
DENSE_KEYS = ("intermediate_size",)
HIDDEN_KEYS = (
    *("hidden_size", "d_model", "moe_latent_size", "moe_hidden_size"),
    "routed_expert_hidden_size",
)
LAYERS_KEYS = ("num_hidden_layers", "n_layers")
# Some count the halves of a layer as num_hidden_layers (longcat_flash), or list layers only.
FEWER_LAYERS_KEYS = ("num_layers",)
LISTED_LAYERS_KEYS = ("layers_block_type",)
MTP_KEYS = (
    *("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules"),
    *("mtp_num_layers", "n_mtp_layers"),
)

# Parts of a model that are not the text model with the experts.
_OTHER_SUBTREES = (
    *("vision", "audio", "rope", "quantization", "compression"),
    *("talker", "code_predictor", "code2wav", "token2wav"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values a config names, each with the key that names it.

    ``counts`` and ``widths`` are the experts and I of each group of a layer, in the order of the
    config's lists; one number where it is not a list. ``unusable`` says what keys hold that is no
    size.
    """

    experts: Mapping[int, str]
    intermediate: Mapping[int, str]
    hidden: Mapping[int, str]
    counts: tuple[int, ...]
    widths: tuple[int, ...]
    contradictions: tuple[str, ...]
    unusable: tuple[str, ...]

    def said(self, known: Mapping[int, str]) -> str:
        """What the config says of one thing, for the end of a message."""
        unusable = f"; {', '.join(self.unusable[:_SHOWN])}, which is no size"
        return f"config.json says {listed(known)}" + (unusable if self.unusable else "")


def listed(known: Mapping[int, str]) -> str:
    """Values with their keys as text.

    >>> listed({8: "num_experts", 9: "text_config.num_experts"}), listed({})
    ('num_experts=8, text_config.num_experts=9', 'nothing')
    """
    first = [f"{key}={number}" for number, key in islice(known.items(), _SHOWN)]
    rest = [f"{len(known) - _SHOWN} more"] if len(known) > _SHOWN else []
    return ", ".join(first + rest) or "nothing"


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Collect expert counts and sizes from a config and its text sub-configs."""
    levels = list(_levels(config, ""))
    experts, intermediate, dense, hidden = (
        _values(levels, keys) for keys in (EXPERTS_KEYS, INTERMEDIATE_KEYS, DENSE_KEYS, HIDDEN_KEYS)
    )
    counts = {
        path + key: show_value(level[key])
        for path, level in levels
        for key in EXPERTS_KEYS
        if _integers(level.get(key))
    }
    contradictions = []
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{key}={value}" for key, value in counts.items())
        contradictions.append(f"config.json: expert counts disagree: {found}")
    return Sizes(
        experts,
        intermediate or dense,
        hidden,
        _first(levels, EXPERTS_KEYS),
        _first(levels, INTERMEDIATE_KEYS),
        tuple(contradictions),
        tuple(
            f"config.json: {path}{key} is {show_value(level[key])}"
            for path, level in levels
            for key in (*EXPERTS_KEYS, *INTERMEDIATE_KEYS, *DENSE_KEYS, *HIDDEN_KEYS)
            if level.get(key) is not None and not _integers(level[key])
        ),
    )


def _values(levels: Sequence[tuple[str, Mapping[str, Any]]], keys: Sequence[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for path, level in levels:
        for key in keys:
            for value in _integers(level.get(key)):
                found.setdefault(value, path + key)
    return found


def _first(levels: Sequence[tuple[str, Mapping[str, Any]]], keys: Sequence[str]) -> tuple[int, ...]:
    found = (tuple(_integers(level.get(key))) for _, level in levels for key in keys)
    return next((values for values in found if values), ())


def model_type_of(config: Mapping[str, Any]) -> str:
    """The model type, or '' if the config names none."""
    value = config.get("model_type")
    return value if isinstance(value, str) else ""


def num_hidden_layers(config: Mapping[str, Any]) -> int | None:
    """Layers of the model with the experts, not counting those for multi-token prediction.

    Raises:
        LayoutError: the config says something that is no number of layers.
    """
    levels = list(_levels(config, ""))
    with_experts = [pair for pair in levels if any(pair[1].get(key) for key in EXPERTS_KEYS)]
    unusable = []
    for key in LAYERS_KEYS:
        for path, level in (*with_experts, *levels):
            if found := _integers(level.get(key)):
                return found[0]
            if level.get(key) is not None:
                unusable.append(f"config.json: {path}{key} is {show_value(level[key])}")
    if unusable:
        raise LayoutError(f"{unusable[0]}; expected a number of layers")
    return None


def num_stacked_layers(config: Mapping[str, Any]) -> int | None:
    """The same as numbers of layers in names go: some count the halves of a layer, or list them.

    Raises:
        LayoutError: the config says something that is no number of layers.
    """
    said = num_hidden_layers(config)
    levels = [level for _, level in levels_of(config)]
    if said is None:
        listed = [level[key] for level in levels for key in LISTED_LAYERS_KEYS if key in level]
        return next((len(value) for value in listed if isinstance(value, list) and value), None)
    fewer = [n for level in levels for key in FEWER_LAYERS_KEYS for n in _integers(level.get(key))]
    return min([said, *fewer])


def announced_mtp(config: Mapping[str, Any]) -> tuple[str, int]:
    """The key that announces layers for multi-token prediction, and how many; ('', 0) if none."""
    for path, level in levels_of(config):
        for key in MTP_KEYS:
            if type(level.get(key)) is int and level[key] > 0:
                return path + key, level[key]
    return "", 0


def levels_of(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The config and what in it speaks of the text model, each with the path to it."""
    return list(_levels(config, ""))


def _levels(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and not any(word in key for word in _OTHER_SUBTREES):
            yield from _levels(value, f"{path}{key}.")


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    if len(values) > _LIST_CAP:
        return []
    return [v for v in values if type(v) is int and 0 < v < _SIZE_CAP]
