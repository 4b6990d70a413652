"""Which runtimes load a checkpoint, by what its formats are, how they are spelled, and its family.

Whether this one is sound is not asked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ...errors import show
from ...formats import find_format
from ...layouts.sizes import model_type_of
from ...layouts.wrappers import family_of_config, text_types_of
from ...loaders.judge import LOADERS, verdicts_on
from ...loaders.loader import Written
from ...source.encodings import ENCODINGS
from ..findings import Findings, Runtime
from ..inventory import Inventory, Module
from ..subject import Subject

__all__ = ["check_recast", "runtimes_of"]


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
    return Written(
        model_type=model_type_of(subject.config),
        text_types=text_types_of(subject.config),
        family=family_of_config(subject.config),
        method=subject.method,
        is_fused=any(found.stacked for found in inventory.experts.values()),
        experts=tuple(experts),
        linears=linears,
        kept=kept,
        dtypes=dict(found for module in inventory.quantized for found in _other_dtypes(module)),
    )


def check_recast(inventory: Inventory, findings: Findings) -> None:
    """Report scales whose bits mean something else in the dtype that runtimes hold."""
    wrong: dict[tuple[str, str], list[str]] = {}
    for module in inventory.quantized:
        wanted = _dtypes_held(module.format, module.what)
        for part, info in module.parts:
            pair = (wanted.get(part.role, ""), info.dtype)
            if any(pair in loader.converts for loader in LOADERS):
                wrong.setdefault(pair, []).append(info.name)
    for (held, stored), tensors in wrong.items():
        runtimes = [loader.name for loader in LOADERS if (held, stored) in loader.converts]
        more = f"; so are {len(tensors) - 1} more" if len(tensors) > 1 else ""
        findings.add(
            "structure",
            show(tensors[0]),
            f"is {stored}; expected {held}{more}",
            f"{' and '.join(runtimes)} hold {held} and convert the number, not its bits: most "
            "scales become 0 or another power of two",
        )


def _other_dtypes(module: Module) -> list[tuple[tuple[str, str], str]]:
    """The parts of a matrix that are not in the dtype of its format."""
    wanted = _dtypes_held(module.format, module.what)
    return [
        ((module.format, part.role), info.dtype)
        for part, info in module.parts
        if wanted.get(part.role, info.dtype) != info.dtype
    ]


@cache
def _dtypes_held(format_name: str, what: str) -> Mapping[str, str]:
    """Role -> the dtype in which runtimes hold that part of matrices that are stored so."""
    wanted = {part.role: part.dtype for part in find_format(format_name).parts}
    named = next((of for of in ENCODINGS if of.name == what), None)
    for scale in named.scales if named else ():
        if scale.dtypes[0] == "F8_E8M0":
            wanted[scale.role] = scale.dtypes[0]
    return wanted
