"""Modules without an activation scale that runtimes take one of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

from ...dialects.matching import Built, UndecidedError
from ...dialects.reading import Reading
from ...errors import show
from ...formats import find_format
from ...runtimes import VLLM
from ...source.encodings import input_name_of
from ..findings import Findings
from ..inventory import Inventory, Module

__all__ = ["bare_modules", "check_inputs"]


def check_inputs(
    inventory: Inventory, by_runtime: Mapping[str, Reading], findings: Findings
) -> None:
    """Report modules without an activation scale that runtimes take one of."""
    told = {finding.where for finding in findings.found if finding.part == "structure"}
    for members in bare_modules(inventory, by_runtime):
        if not _is_told_already(members, told):
            _add_bare(members[0], len(members), findings)


def bare_modules(
    inventory: Inventory, by_runtime: Mapping[str, Reading]
) -> Iterator[Sequence[Module]]:
    """Modules without an activation scale that runtimes take one of, those of a layer together."""
    reading = next(iter(by_runtime.values()), None)
    if reading is None or not reading.static:
        return
    bare = {
        module.name: module
        for module in inventory.quantized
        if module.tensor("input_scale") is None
        and module.format.removesuffix("-w4a16") in reading.static
    }
    if not bare:
        return
    for name, experts in inventory.experts.items():
        members = {module.name: module for module in experts.matrices if module.name in bare}
        if members:
            found = _read(reading, Built(name, tuple(members), None, is_experts=True))
            if found in reading.static:
                yield [*members.values()]
    for name in bare:
        found = _read(reading, Built(name, (name,), None)) if name in inventory.linears else None
        if found in reading.static:
            yield [bare[name]]


def _read(reading: Reading, module: Built) -> str | None:
    try:
        return next(iter(reading.readers.values()))(module)
    except UndecidedError:
        return None


def _is_told_already(members: Sequence[Module], told: Set[str]) -> bool:
    return any(f"{module.name}.{input_name_of(module.what)}" in told for module in members)


def _add_bare(module: Module, count: int, findings: Findings) -> None:
    more = f", and {count - 1} more of the layer lack it too" if count > 1 else ""
    findings.add(
        "structure",
        show(f"{module.name}.{input_name_of(module.what)}"),
        f"is missing; the configuration says that activations have a static scale{more}",
        "vLLM takes what memory held for NVFP4 and 1.0 for FP8, SGLang takes 1.0: nothing is said",
        harms=(VLLM,) if find_format(module.format).weights == "nvfp4" else (),
    )
