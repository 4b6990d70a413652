"""Configuration files written from the tensors, in the words of the dialect that they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..dialects import DIALECTS, Assignment, Dialect, QuantizedExperts, dialect_that_writes
from ..errors import LayoutError, Problems, show, show_some
from ..formats import UNQUANTIZED
from ..layouts.roles import reason_to_keep
from ..planning.assignment import assign
from ..planning.choice import choose
from ..planning.kv_cache import KV_SCALES
from ..planning.recipe import KEEP, Recipe
from ..verify.inventory import Inventory, Module, inventory_of
from ..verify.subject import Subject

__all__ = ["Written", "dialect_of", "written_from_tensors"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Written:
    """The configuration files of a checkpoint, and the dialect they are in."""

    files: Mapping[str, str]
    dialect: Dialect


def dialect_of(subject: Subject) -> Dialect | None:
    """The dialect that the tensors are spelled in, that of the configuration first."""
    said = dialect_that_writes(subject.method)
    quantized = list(inventory_of(subject).quantized)

    def fits(dialect: Dialect) -> bool:
        return all(_is_written_by(dialect, module) for module in quantized)

    tried = [*([said] if said else []), *DIALECTS]
    return next((dialect for dialect in tried if fits(dialect)), None)


def _is_written_by(dialect: Dialect, module: Module) -> bool:
    """Whether the tensors of a module have the names, and in shape what the dialect writes."""
    if module.format not in dialect.spellings:
        return False
    is_stacked = len(module.shape) == 3
    return all(
        info.name == dialect.tensor_name(module.format, module.name, part.role, is_stacked)
        and (is_stacked or part.is_scalar or info.shape == part.shape(*module.shape))
        for part, info in module.parts
    )


def written_from_tensors(subject: Subject) -> Written:
    """What the configuration files of a checkpoint should say.

    Raises:
        InputError: no configuration can say it, or the experts cannot be told.
    """
    detection, weights = subject.detection, subject.weights
    dialect = dialect_of(subject)
    if dialect is None:
        raise LayoutError("no dialect has these formats under these names")
    if detection is None:
        inventory = inventory_of(subject)
        if not any(experts.stacked for experts in inventory.experts.values()):
            raise LayoutError(*subject.undetected)
        return Written(dialect.config_files(subject.config, _of_stacks(inventory)), dialect)
    if detection.renamed:
        raise LayoutError(
            f"{show_some(detection.renamed)}: are names that runtimes do not read; `moe-ckpt "
            "convert` gives them back those they read"
        )
    problems = Problems()
    choice = choose(weights.tensors, detection, Recipe(()), problems, method=dialect.name)
    problems.check()
    assigned = assign(
        subject.config,
        weights,
        detection,
        choice,
        [KEEP] * len(detection.experts),
        dialect,
        kv_cache=any(name.endswith(KV_SCALES) for name in weights.tensors),
    )
    formats = {
        name: found
        for of, found in zip(detection.experts, assigned.experts, strict=True)
        for name in of.tensors
        if name in weights.tensors
    }
    formats |= assigned.stays
    unsaid = [
        name
        for name, found in formats.items()
        if found == UNQUANTIZED and not weights.encoded(name).is_plain
    ]
    if unsaid:
        raise LayoutError(
            f"{show_some(unsaid)}: no configuration of {dialect.name} says what they are; "
            "`moe-ckpt convert` decodes them"
        )
    return Written(assigned.files, dialect)


def _of_stacks(inventory: Inventory) -> Assignment:
    """What is quantized where experts are stacked and quantized, which no source is read of."""
    experts: dict[str, list[QuantizedExperts]] = {}
    for name, found in inventory.experts.items():
        matrices = list(found.matrices)
        formats = {module.format for module in matrices}
        if len(formats) > 1:
            raise LayoutError(f"{show(name)}: its experts are not quantized alike")
        layer = QuantizedExperts(name, 0, matrices[0].shape[0], _PROJECTIONS)
        experts.setdefault(formats.pop(), []).append(layer)
    linears: dict[str, list[str]] = {}
    kept = []
    for name, module in inventory.linears.items():
        if module.is_quantized:
            linears.setdefault(module.format, []).append(name)
        elif reason_to_keep(name) != "embedding":
            kept.append(name)
    return Assignment(experts=experts, linears=linears, kept=kept, set_aside={})
