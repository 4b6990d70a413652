"""Which module becomes which format, as configuration files must say it.

What stays and is quantized in the source keeps its form if the dialect can say so beside the
formats of the recipe; else it is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dialects import Assignment, Dialect, QuantizedExperts
from ..errors import LayoutError, Problems
from ..formats import UNQUANTIZED, find_format
from ..layouts import Detection, Experts
from ..layouts.roles import module_of
from ..source.stored import Encoded
from ..source.weights import Weights
from .choice import Choice, format_of_experts
from .recipe import KEEP, Recipe

__all__ = ["Assigned", "assign"]

# Some runtime builds these in 16 bits, whatever a configuration says: to keep the form of one
# would cost that of all others.
_BUILT_PLAIN = ("embedding", "output head")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Assigned:
    """The formats, and the configuration files that say them.

    ``experts``: the format of each group of routed experts, in the order of the detection.
    ``stays``: source tensor that stays and is quantized in the source -> its format.
    ``kept_dtypes``: format and role -> the dtype that it keeps from the source.
    """

    experts: tuple[str, ...]
    stays: Mapping[str, str]
    assignment: Assignment
    files: Mapping[str, str]
    kept_dtypes: Mapping[tuple[str, str], str]


def assign(
    config: Mapping[str, Any],
    weights: Weights,
    detection: Detection,
    choice: Choice,
    experts: Sequence[str],
    dialect: Dialect,
    *,
    kv_cache: bool,
) -> Assigned:
    """Decide on what the recipe keeps, and write the configuration.

    Args:
        config: the source's.
        weights: the source's.
        detection: its experts.
        choice: what happens to the other tensors.
        experts: format or "keep" for each group of experts of the detection.
        dialect: how the output is spelled.
        kv_cache: whether the output stores k and v as FP8.

    Raises:
        LayoutError: no configuration tells every runtime what is quantized.
    """
    wanted = {*experts, *(chosen for _, chosen in choice.linears)} - {KEEP}

    def form(name: str, in_form: bool) -> str:
        encoded = weights.encoded(name)
        stored = encoded.format
        if not in_form or encoded.is_plain or stored not in dialect.spellings:
            return UNQUANTIZED
        target = find_format(stored)
        if weights.tensors[name].shape[-1] % target.k_multiple:
            return UNQUANTIZED
        if target.input_scale and not encoded.has_input_scale:
            return UNQUANTIZED  # its activations are not quantized with a scale that is stored
        return stored if dialect.mixes or wanted <= {stored} else UNQUANTIZED

    def form_of(found: Experts, in_form: bool) -> str:
        forms = {form(side.tensors[0], in_form) for side in found.sides}
        name = forms.pop()
        rows = {n for side in found.sides for n in side.rows}
        fits = not forms and not any(n % find_format(name).n_multiple for n in rows)
        return name if fits else UNQUANTIZED

    def attempt(in_form: bool) -> Assigned:
        chosen = tuple(
            form_of(found, in_form) if wish == KEEP else wish
            for found, wish in zip(detection.experts, experts, strict=True)
        )
        stays = {
            name: form(name, in_form and reason not in _BUILT_PLAIN)
            for name, reason in choice.copies
            if not weights.encoded(name).is_plain
        }
        formats = tuple(dict.fromkeys((*wanted, *chosen, *stays.values())))
        mixed = tuple(name for name in formats if name != UNQUANTIZED)
        if in_form and len(mixed) > 1 and dialect.refused_mix(mixed):
            raise LayoutError(dialect.refused_mix(mixed))
        stored = _stored_as(weights, detection, choice, chosen, stays)
        moved = {name for name, of in stored.items() if {e.format for e in of} == {name}}
        assignment = _assignment(
            detection, choice, chosen, stays, kv_cache=kv_cache, moved=frozenset(moved)
        )
        files = dialect.config_files(config, assignment)
        return Assigned(chosen, stays, assignment, files, _kept_dtypes(stored, dialect))

    try:
        return attempt(in_form=True)
    except LayoutError:
        if not weights.encodings:
            raise
        return attempt(in_form=False)


def formats_of_experts(detection: Detection, recipe: Recipe, problems: Problems) -> tuple[str, ...]:
    """What the recipe says of each group of experts."""
    return tuple(format_of_experts(found, recipe, problems) for found in detection.experts)


def _assignment(
    detection: Detection,
    choice: Choice,
    chosen: Sequence[str],
    stays: Mapping[str, str],
    *,
    kv_cache: bool,
    moved: frozenset[str],
) -> Assignment:
    experts: dict[str, list[QuantizedExperts]] = {}
    linears: dict[str, list[str]] = {}
    for found, name in zip(detection.experts, chosen, strict=True):
        experts.setdefault(name, []).append(_quantized(found))
    for group, name in choice.linears:
        linears.setdefault(name, []).extend(detection.output_name(module) for module in group)
    inside: dict[str, dict[str, list[tuple[int, str]]]] = {}
    quantized: set[str] = set()
    for tensor, name in stays.items():
        module = detection.output_name(module_of(tensor))
        if name == UNQUANTIZED:
            continue
        match = _EXPERT.fullmatch(module)
        if match:
            layer = inside.setdefault(name, {}).setdefault(match[1], [])
            layer.append((int(match[2]), match[3]))
            quantized.add(match[1])
        else:
            linears.setdefault(name, []).append(module)
            quantized.add(module)
    for name, layers in inside.items():
        for module, members in layers.items():
            numbers = [number for number, _ in members]
            projections = tuple(dict.fromkeys(projection for _, projection in members))
            first, last = min(numbers), max(numbers)
            experts.setdefault(name, []).append(
                QuantizedExperts(module, first, last - first + 1, projections)
            )
    kept = [module for module in choice.kept if module not in quantized]
    kept += built_as(detection)
    aside: dict[str, Sequence[str]] = {}
    for prefix, modules in choice.set_aside.items():
        rest = [module for module in dict.fromkeys(modules) if module not in quantized]
        if len(rest) == len(set(modules)):
            aside[prefix] = modules
        else:
            kept += rest
    return Assignment(
        experts=experts,
        linears=linears,
        kept=kept,
        set_aside=aside,
        kv_cache=kv_cache,
        moved=moved,
    )


def _stored_as(
    weights: Weights,
    detection: Detection,
    choice: Choice,
    experts: Sequence[str],
    stays: Mapping[str, str],
) -> dict[str, set[Encoded]]:
    """Format of the output -> how the source stores what becomes that, for all its matrices."""
    found: dict[str, set[Encoded]] = {}
    for group, name in zip(detection.experts, experts, strict=True):
        stored = {weights.encoded(tensor) for side in group.sides for tensor in side.tensors}
        found.setdefault(name, set()).update(stored)
    for modules, name in choice.linears:
        found.setdefault(name, set()).update(weights.encoded(f"{m}.weight") for m in modules)
    for tensor, name in stays.items():
        found.setdefault(name, set()).add(weights.encoded(tensor))
    return found


def _kept_dtypes(
    stored: Mapping[str, set[Encoded]], dialect: Dialect
) -> dict[tuple[str, str], str]:
    """Format and role -> the dtype that all of the source's have, and that the dialect keeps."""
    found = {}
    for name, encodings in stored.items():
        for role, kept in dialect.spellings[name].kept_dtypes.items():
            dtypes = {part.dtype for of in encodings for part in of.parts if part.role == role}
            is_moved = all(of.format == name for of in encodings)
            if is_moved and len(dtypes) == 1 and dtypes <= {*kept}:
                found[name, role] = dtypes.pop()
    return found


def built_as(detection: Detection) -> list[str]:
    """Routers that runtimes build under names that no tensor has."""
    family = detection.family
    layers = {found.output.removesuffix(f".{family.split}") for found in detection.experts}
    return [f"{layer}.{name}" for layer in sorted(layers) for name in family.built_as]


def _quantized(found: Experts) -> QuantizedExperts:
    return QuantizedExperts(found.output, found.first, found.num_experts, found.projections)
