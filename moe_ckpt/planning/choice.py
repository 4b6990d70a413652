"""What becomes of every weight: which format the recipe gives it, or that it stays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..dtypes import CODES, FLOATS
from ..errors import CheckpointError, Problems, RecipeError, show, show_some
from ..layouts import Detection, Experts
from ..layouts.places import expert_modules
from ..layouts.roles import amax_groups, is_matrix, module_of, reason_to_keep, set_aside
from ..loaders.judge import is_built_plain
from ..source.headers import TensorInfo
from .recipe import KEEP, Recipe

_BUILT_PLAIN = "built in 16 bits by every runtime"

__all__ = ["Choice", "choose", "format_of_experts"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Each tensor outside the routed experts in one of two ways.

    ``linears``: groups of source modules that read the same input, and the format of each.
    ``copies``: source tensors that stay, with the reason.
    ``kept``: output modules that stay, and would be linear layers for a runtime.
    ``set_aside``: part of the model that stays whole -> output modules in it.
    """

    linears: tuple[tuple[tuple[str, ...], str], ...]
    copies: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]
    set_aside: Mapping[str, Sequence[str]]


def format_of_experts(found: Experts, recipe: Recipe, problems: Problems) -> str:
    """The format that the recipe gives to the routed experts of a layer, or "keep"."""
    formats: dict[str, str] = {}
    for expert in range(found.num_experts):
        for name in (n for side in found.sides for n in expert_modules(found, side, expert)):
            formats.setdefault(recipe.format_of(name, found.output), name)
    if len(formats) > 1:
        each = [f"{name} {chosen}" for chosen, name in formats.items()]
        problems.add(
            RecipeError,
            f"{recipe.file}: {show(found.output)}: all experts of a layer must have one format, "
            f"found {show_some(each)}",
        )
    return next(iter(formats))


def choose(
    tensors: Mapping[str, TensorInfo],
    detection: Detection,
    recipe: Recipe,
    problems: Problems,
    *,
    method: str,
) -> Choice:
    """Sort the tensors outside the experts.

    ``method``: the ``quant_method`` that the output will have.
    """
    output_name = detection.output_name
    consumed = {name for found in detection.experts for name in found.tensors}
    candidates: list[tuple[str, int]] = []
    copies: list[tuple[str, str]] = []
    kept: list[str] = []
    aside: dict[str, list[str]] = {}
    coded: list[str] = []
    for name, info in tensors.items():
        if name in consumed:
            continue
        module = module_of(name)
        matrix = is_matrix(name, info.shape)
        if matrix and info.dtype in CODES:
            coded.append(f"{name} {info.dtype}")
        part = set_aside(name, detection.stacks, detection.num_layers)
        if part is not None:
            copies.append((name, part.reason))
            inside = aside.setdefault(part.prefix, [])
            if matrix:
                inside.append(output_name(_without_expert(module)))
            continue
        reason = reason_to_keep(module) if matrix else "not a matrix"
        if reason is None and is_built_plain(
            detection.family, detection.model_type, method, output_name(module)
        ):
            reason = _BUILT_PLAIN
        if reason is None and info.dtype in FLOATS:
            candidates.append((module, info.shape[1]))
            continue
        copies.append((name, reason or "not a matrix of numbers"))
        if matrix and reason != "embedding":
            kept.append(output_name(module))
    if coded:
        problems.add(
            CheckpointError,
            f"{show_some(coded)}: holds codes without scales; the checkpoint is incomplete, or "
            "quantized in a way that this version does not know",
        )
    recipe.saw_kept([*kept, *(name for inside in aside.values() for name in inside)])
    never = list(kept)
    reason_kept = "kept by the recipe" if recipe.file else "not a routed expert"
    linears = []
    for group in amax_groups(candidates):
        formats: dict[str, str] = {}
        for module in group:
            formats.setdefault(recipe.format_of(output_name(module)), module)
        if len(formats) > 1:
            each = [f"{output_name(m)} {chosen}" for chosen, m in formats.items()]
            problems.add(
                RecipeError,
                f"{recipe.file}: {show_some(each)}: runtimes build these as one module, and they "
                "must have one format",
            )
        chosen = next(iter(formats))
        if chosen != KEEP:
            linears.append((group, chosen))
            continue
        copies += ((f"{module}.weight", reason_kept) for module in group)
        kept += (output_name(module) for module in group)
    recipe.refuse_unused(never, problems)
    return Choice(tuple(linears), tuple(copies), tuple(kept), aside)


def _without_expert(module: str) -> str:
    """The experts of a layer as one module: runtimes must never be told of a single one."""
    return re.sub(r"\.experts\.\d+\..*", ".experts", module)
