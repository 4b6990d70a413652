"""What training tools leave in the names of a checkpoint, and the names of the release behind it.

torch.compile, data parallelism, activation checkpointing and PEFT put words into the path of every
module that they wrap, and another class than the release's puts another beginning before it. The
words mean nothing to a model, so they go; a beginning is changed where that leads to the names
that runtimes of the family read. Where it does not, or where two tensors would get one name, the
checkpoint is refused, and so are adapters, which are weights yet to be added to others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LayoutError, show, show_some
from ..source.checkpoint import MERGE, Source
from .family import Family
from .names import (
    WRAPPER_WORDS,
    computed_from,
    named_twice,
    of_adapters,
    roots_in,
    unread_names,
    wrapped_names,
)
from .roles import set_aside
from .sizes import model_type_of
from .wrappers import family_of_config

__all__ = ["Unwrapped", "unwrap", "without_wrappers"]

_WORD = re.compile(
    r"(?<![^.])(?:(modules_to_save)\.[^.]+|("
    + "|".join(word for word in WRAPPER_WORDS if word not in ("modules_to_save", "base_model"))
    + r"))(?:\.|$)"
)
_PEFT = re.compile(r"(?:base_model\.model\.)+")
# Where transformers keeps the text model in a multimodal one: as it did first, and does since 4.52.
_FIRST, _SINCE = "language_model.model.", "model.language_model."

# Beginnings of names and what they become, the first that fits.
Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A source with the names of the release, and the beginnings that were changed for that."""

    source: Source
    changes: Changes = ()


def without_wrappers(name: str) -> str:
    """The name of a tensor or module without the words that wrappers put into it.

    >>> without_wrappers("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.gate")
    'model.layers.0.mlp.gate'
    >>> without_wrappers("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    plain = _WORD.sub("", name)
    match = _PEFT.match(plain)
    return (plain[match.end() :] if match else plain).rstrip(".")


def unwrap(source: Source) -> Unwrapped:
    """A source with the names that a release would have; the same one if it has them.

    Raises:
        LayoutError: the names behind the words are not certain, or it holds an adapter.
    """
    _refuse_adapters(source)
    old = list(source.tensors)
    wrapped = {*wrapped_names(old)}
    new = [without_wrappers(name) if name in wrapped else name for name in old]
    # Of a config.json without a model type nobody knows the names.
    family = family_of_config(source.config) if model_type_of(source.config) else None
    _refuse_twice(old, new)
    changes: Changes = ()
    if family is not None:
        if twice := named_twice(family, new):
            one, other = twice[0]
            raise LayoutError(
                f"{show(one)}: is there also as {show(other)}, and {len(twice) - 1} more so; which "
                "of them counts cannot be told. Remove one of each"
            )
        changes = _changes(family, new, source.config)
        new = [_changed(name, changes) for name in new] if changes else new
    if new == old:
        return Unwrapped(source)
    renamed = {one: other for one, other in zip(old, new, strict=True) if one != other}
    if family is not None:
        lost = unread_names(family, map(family.runtime_name, new))
        if lost:
            raise LayoutError(
                f"{show_some(lost)}: is left of the names once {_words(renamed, changes)} is taken "
                f"out of them, and no runtime of {family.name} reads it; save the model again "
                "without what wraps it"
            )
    tensors = {
        name: info._replace(name=name)
        for name, info in zip(new, source.tensors.values(), strict=True)
    }
    one, other = next(iter(renamed.items()))
    note = (
        f"{len(renamed)} tensors lose what wrapped the model when it was saved "
        f"({_words(renamed, changes)}), such as {show(one)}, now {show(other)}"
    )
    return Unwrapped(replace(source, tensors=tensors, notes=(*source.notes, note)), changes)


def _refuse_adapters(source: Source) -> None:
    found = of_adapters(source.tensors)
    if found:
        raise LayoutError(
            f"{show_some(found)}: belongs to an adapter, such as LoRA, which changes the weights "
            f"that it stands beside; {MERGE}"
        )
    found = computed_from(source.tensors)
    if found:
        raise LayoutError(
            f"{show_some(found)}: PyTorch computes a weight from this, by a parametrization or by "
            "pruning, and runtimes do not; call torch.nn.utils.parametrize.remove_parametrizations "
            "or torch.nn.utils.prune.remove, and save the model again"
        )


def _refuse_twice(old: Sequence[str], new: Sequence[str]) -> None:
    """Refuse names that would be one name."""
    if len(set(new)) == len(new):
        return
    counts = Counter(new)
    double = next(name for name in new if counts[name] > 1)
    these = [one for one, other in zip(old, new, strict=True) if other == double]
    advice = "which of them counts cannot be told. Save the model again without what wraps it"
    if any("modules_to_save" in name.split(".") for name in these):
        advice = f"it is what an adapter trained, and the original; {MERGE}"
    raise LayoutError(f"{show_some(these)}: are both {show(double)}; {advice}")


def _words(renamed: Mapping[str, str], changes: Changes) -> str:
    """What was taken out of names."""
    words: dict[str, None] = {}
    for name in wrapped_names(renamed):
        words |= dict.fromkeys(match[1] or match[2] for match in _WORD.finditer(name))
        if _PEFT.match(_WORD.sub("", name)):
            words["base_model.model"] = None
    words |= dict.fromkeys(f"{old}* for {new}*" if new else f"{old}*" for old, new in changes)
    return ", ".join(words)


# Beginnings


def _changes(family: Family, names: Sequence[str], config: Mapping[str, Any]) -> Changes:
    """How to change the beginnings of names so that the layers lie at a root of the family.

    () if they do, or if no change leads to names that are read.
    """
    roots = roots_in(map(family.runtime_name, names) if family.prefixes else names)
    if len(roots) != 1 or not roots.isdisjoint(family.roots):
        return ()
    (wrong,) = roots
    if wrong == "model." or any(part in wrong for part in family.not_restorable):
        return ()  # a text model alone, or what transformers renames further in too
    for right in _roots_by_likelihood(family, config):
        for changes in _candidates(wrong, right, names):
            new = [_changed(name, changes) for name in names]
            if len(set(new)) == len(new) and not unread_names(family, new):
                return changes
    return ()


def _roots_by_likelihood(family: Family, config: Mapping[str, Any]) -> list[str]:
    """The family's roots, that of a text model first if the config is of a text model alone."""
    is_text = not any(
        key.endswith("_config") and key != "quantization_config" and isinstance(config[key], dict)
        for key in config
    )
    return sorted(family.roots, key=lambda root: is_text and "language_model" in root)


def _candidates(wrong: str, right: str, names: Iterable[str]) -> list[Changes]:
    """What may have been done to names that begin so, to be undone."""
    found: list[Changes] = []
    parts = dict.fromkeys(part for name in names if (part := _part_beside(name)))
    if (wrong, right) == (_SINCE, _FIRST):
        moved = tuple((f"model.{part}.", f"{part}.") for part in parts)
        found.append(((wrong, right), ("lm_head.", "language_model.lm_head."), *moved))
    if (wrong, right) == (_FIRST, _SINCE):
        moved = tuple((f"{part}.", f"model.{part}.") for part in parts)
        found.append(((wrong, right), ("language_model.lm_head.", "lm_head."), *moved))
    if wrong.endswith(f".{right}"):
        found.append(((wrong.removesuffix(right), ""),))
    beside = [(f"{part}.", f"{part}.") for part in ("lm_head", *parts)]
    return [*found, (*beside, (wrong, right))]


def _part_beside(name: str) -> str | None:
    """The part beside the text model that a tensor belongs to, such as a vision tower."""
    part = set_aside(name.removeprefix("model."), frozenset(), None)
    return part.prefix if part and "." not in part.prefix else None


def _changed(name: str, changes: Changes) -> str:
    for old, new in changes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
