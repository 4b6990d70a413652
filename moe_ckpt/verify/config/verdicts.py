"""Which runtimes load a checkpoint, by what its formats are, how they are spelled, and its family.

Whether this one is sound is not asked here.
"""

from __future__ import annotations

from ...formats import find_format
from ...layouts.sizes import model_type_of
from ...loaders.judge import verdicts_on
from ...loaders.loader import FUSED, SPLIT, Written
from ..findings import Runtime
from ..inventory import Inventory, Module
from ..subject import Subject

__all__ = ["runtimes_of"]


def runtimes_of(subject: Subject, inventory: Inventory) -> list[Runtime]:
    """Every runtime, and why it does not load the checkpoint, if it does not."""
    return [Runtime(*verdict) for verdict in verdicts_on(_written(subject, inventory))]


def _written(subject: Subject, inventory: Inventory) -> Written:
    """What is written, as far as loaders look at it."""
    experts = {
        module.format: None for found in inventory.experts.values() for module in found.matrices
    }
    linears: dict[str, list[str]] = {}
    kept = []
    for name, module in inventory.linears.items():
        if module.is_quantized:
            linears.setdefault(module.format, []).append(name)
        else:
            kept.append(name)
    is_fused = any(found.stacked for found in inventory.experts.values())
    return Written(
        model_type=model_type_of(subject.config),
        method=subject.method,
        form=FUSED if is_fused else SPLIT,
        experts=tuple(experts),
        linears=linears,
        kept=kept,
        dtypes=dict(found for module in inventory.quantized for found in _other_dtypes(module)),
    )


def _other_dtypes(module: Module) -> list[tuple[tuple[str, str], str]]:
    """The parts of a matrix that are not in the dtype of its format."""
    wanted = {part.role: part.dtype for part in find_format(module.format).parts}
    return [
        ((module.format, part.role), info.dtype)
        for part, info in module.parts
        if wanted.get(part.role, info.dtype) != info.dtype
    ]
