"""Configuration files written from the tensors, in the words of the dialect that they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..dialects import DIALECTS, Dialect, dialect_that_writes
from ..errors import LayoutError, Problems, show_some
from ..formats import UNQUANTIZED
from ..planning.assignment import assign
from ..planning.choice import choose
from ..planning.kv_cache import KV_SCALES
from ..planning.recipe import KEEP, Recipe
from ..verify.inventory import inventory_of
from ..verify.subject import Subject

__all__ = ["Written", "dialect_of", "written_from_tensors"]


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
        return all(
            module.format in dialect.spellings
            and info.name
            == dialect.tensor_name(module.format, module.name, part.role, len(module.shape) == 3)
            for module in quantized
            for part, info in module.parts
        )

    tried = [*([said] if said else []), *DIALECTS]
    return next((dialect for dialect in tried if fits(dialect)), None)


def written_from_tensors(subject: Subject) -> Written:
    """What the configuration files of a checkpoint should say.

    Raises:
        InputError: no configuration can say it, or the experts cannot be told.
    """
    detection, weights = subject.detection, subject.weights
    if detection is None:
        raise LayoutError(*subject.undetected)
    dialect = dialect_of(subject)
    if dialect is None:
        raise LayoutError("no dialect has these formats under these names")
    if detection.renamed:
        raise LayoutError(
            f"{show_some(detection.renamed)}: are names that runtimes do not read; `moe-ckpt "
            "convert` gives them back those they read"
        )
    problems = Problems()
    choice = choose(weights.tensors, detection, Recipe(()), problems)
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
