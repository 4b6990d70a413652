"""Quantized experts of a layer in one tensor, as ModelOpt exports Llama 4 and gpt-oss.

`dialects.modelopt.table` says how they are spelled: codes are [E, K, N], or what is left of K where
several lie in one item, and scales are beside them. Where a checkpoint is a source they are not
read, so they are not among its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..dialects.dialect import Spelling
from ..dialects.modelopt.table import ALGORITHMS
from ..formats import Part, find_format
from ..source.encodings import CODE_DTYPES
from ..source.headers import TensorInfo
from ..source.weights import Found

__all__ = ["STACK_FORMS", "Stack", "StackForm", "read_stacks"]


class StackForm(NamedTuple):
    """How a format is stacked: codes of a dtype that hold ``columns`` weights each, and scales.

    ``scales``: role, ending, dtype, and the weights of a column that share one; 0 for all.
    """

    format: str
    what: str
    dtype: str
    columns: int
    scales: tuple[tuple[str, str, str, int], ...]

    def scale_shape(self, codes: TensorInfo, columns: int) -> tuple[int, ...]:
        """The shape of a scale beside these codes."""
        E, K, N = codes.shape
        return (E, K * self.columns // columns, N) if columns else ()


class Stack(NamedTuple):
    """A stack: its sizes [E, N, K], and the parts with their tensors."""

    format: str
    what: str
    shape: tuple[int, int, int]
    parts: tuple[tuple[Part, TensorInfo], ...]


def _form(spelling: Spelling) -> StackForm:
    codes, *scales = find_format(spelling.format).parts
    return StackForm(
        spelling.format,
        f"{spelling.what}, stacked",
        codes.dtype,
        codes.columns,
        tuple((p.role, f"_{spelling.suffixes[p.role]}", p.dtype, p.columns) for p in scales),
    )


STACK_FORMS = tuple(_form(of.spelling) for of in ALGORITHMS if of.is_stacked)


def read_stacks(
    tensors: Mapping[str, TensorInfo], found: Found
) -> tuple[dict[str, Stack], tuple[TensorInfo, ...]]:
    """The whole stacks, by the names of their codes, and what else belongs to no weight."""
    stacks: dict[str, Stack] = {}
    used: set[str] = set()
    for info in tensors.values():
        if len(info.shape) != 3 or not info.name.endswith("_proj") or info.name in found.stored:
            continue
        for form in STACK_FORMS:
            stack = _stack(form, info, tensors)
            if stack:
                stacks[info.name] = stack
                used.update(tensor.name for _, tensor in stack.parts)
                break
    left = [info.name for info, _ in found.unread] + [*found.orphans]
    left += [
        info.name
        for info in tensors.values()
        if len(info.shape) == 3
        and info.dtype in CODE_DTYPES
        and info.name.endswith("_proj")
        and info.name not in found.stored
    ]
    left += [name for name in tensors if name.endswith("_proj_input_scale")]
    return stacks, tuple(tensors[name] for name in dict.fromkeys(left) if name not in used)


def _stack(form: StackForm, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Stack | None:
    if codes.dtype != form.dtype:
        return None
    parts = [(Part("qweight", codes.dtype, form.columns), codes)]
    for role, ending, dtype, columns in form.scales:
        info = tensors.get(codes.name + ending)
        if info is None or info.dtype != dtype:
            return None
        if info.shape != form.scale_shape(codes, columns):
            return None
        parts.append((Part(role, dtype, columns), info))
    E, K, N = codes.shape
    return Stack(form.format, form.what, (E, N, K * form.columns), tuple(parts))
