"""Names that transformers changes when it saves a model, and how runtimes get them back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from ..errors import LayoutError, Problems, show_some
from ..source.headers import TensorInfo
from .experts import Experts
from .family import SPLIT, Family
from .layers import stack_of

__all__ = ["refuse_unrestorable", "restore_names"]


def refuse_unrestorable(
    family: Family, tensors: Mapping[str, TensorInfo], problems: Problems
) -> None:
    """Report names that only transformers writes, and whose old form is lost."""
    lost = family.not_restorable
    found = [name for name in tensors if any(part in name for part in lost)] if lost else []
    if found:
        problems.add(
            LayoutError,
            f"{show_some(found)}: transformers renamed these when it saved the model, and runtimes "
            f"of {family.name} do not read the new names; save it again with "
            "save_original_format=True",
        )


def restore_names(
    family: Family, experts: list[Experts], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """The names that runtimes read, for tensors that transformers renamed."""
    stacks = {stack_of(found.layer) for found in experts if found.layout != SPLIT}
    consumed = {name for found in experts for name in found.tensors}
    renamed: dict[str, str] = {}
    for name in tensors:
        if name in consumed:
            continue
        new = family.runtime_name(_restore_sibling(family, name, stacks))
        if new != name:
            renamed[name] = new
    return renamed


def _restore_sibling(family: Family, name: str, stacks: Set[str]) -> str:
    """The name of a tensor in a layer of a stack with fused experts."""
    match = re.match(r"((.+?)\.[0-9]+)\.", name) if family.renames else None
    if match is None or match[2] not in stacks:
        return name
    rest = name[match.end() :]
    for old, new in family.renames:
        if rest.startswith(old):
            return f"{match[1]}.{new}{rest.removeprefix(old)}"
    return name
