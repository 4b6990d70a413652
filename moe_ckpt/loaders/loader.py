"""What is known of a runtime's loader beside the tables of families and of dialects.

A family's row says which runtimes have the model, and a dialect's which of them read a format of
it. What follows from neither is here: the modules that a model class builds in 16 bits whatever
the configuration says, and the combinations at which it stops, or that it gets wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..formats import UNQUANTIZED
from ..layouts.family import Family

__all__ = ["Limit", "Loader", "Plain", "Verdict", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """What is written, as far as a loader looks at it.

    ``text_types``: the model types of text models in it. ``family``: the row of the model, None if
    there is none. ``method`` is the ``quant_method``, "" if nothing is said of quantization.
    ``is_fused``: whether the experts of a layer are in one tensor. ``experts``: the formats of
    routed experts. ``linears``: format -> linear layers that are quantized to it. ``kept``: those
    that are not. ``dtypes``: (format, role) -> the dtype of such parts where it is not the
    format's own. ``unread``: names that no runtime is known to read.
    """

    model_type: str
    text_types: tuple[str, ...]
    family: Family | None
    method: str
    is_fused: bool
    experts: tuple[str, ...]
    linears: Mapping[str, Sequence[str]]
    kept: Sequence[str] = ()
    dtypes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    unread: Sequence[str] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """All formats, those of experts first."""
        return tuple(dict.fromkeys((*self.experts, *self.linears)))

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model type, and those of text models in it, whose classes runtimes build."""
        return (self.model_type, *self.text_types)

    @property
    def is_mixed(self) -> bool:
        """Whether several formats quantize it."""
        return len({*self.formats} - {UNQUANTIZED}) > 1


class Verdict(NamedTuple):
    """Whether a runtime loads what is written.

    ``why_not``: why it does not. ``garbage``: what it gets wrong, though it loads. Both are "" if
    it loads it and computes what is meant.
    """

    runtime: str
    why_not: str = ""
    garbage: str = ""

    @property
    def loads(self) -> bool:
        """Whether it loads it and computes what is meant."""
        return not (self.why_not or self.garbage)


@dataclass(frozen=True, slots=True)
class Plain:
    """Linear layers that a runtime builds in 16 bits, whatever the configuration says.

    ``modules``: a pattern that is found in their names. ``model_types``, ``methods``, ``formats``:
    where; everywhere if empty. ``besides``: the model types of which it does not hold.
    """

    model_types: tuple[str, ...]
    modules: str
    methods: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limit:
    """What a runtime does not load, of models that it has and in formats that it reads.

    ``why``: what happens. ``model_types``, ``methods``, ``formats``: where; anywhere if empty, in
    checkpoints that are not quantized, too.
    ``modules``: a pattern for the linear layers that must be of such a format; None for routed
    experts. ``kept``: a pattern for linear layers that must be in 16 bits beside them.
    ``in_mixes``: whether it holds only where several formats stand in one checkpoint.
    ``is_garbage``: whether it loads them all the same, and computes something else.
    """

    why: str
    model_types: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    modules: str | None = None
    kept: str = ""
    in_mixes: bool = False
    is_garbage: bool = False


@dataclass(frozen=True, slots=True)
class Loader:
    """A runtime's loader, as it is in one version.

    ``knows_all``: whether it stops at a tensor of another name than its modules have.
    ``is_run``: whether it was run to learn this, and not only read. ``converts``: the dtype that it
    holds, and another of as many bytes that it converts to it by value, so that it is wrong.
    """

    name: str
    version: str
    plain: tuple[Plain, ...] = ()
    limits: tuple[Limit, ...] = ()
    converts: tuple[tuple[str, str], ...] = ()
    knows_all: bool = False
    is_run: bool = False

    def built_plain(
        self, model_types: Sequence[str], method: str, module: str, format_name: str = ""
    ) -> bool:
        """Whether it builds a linear layer in 16 bits; in any format, if none is given."""
        return any(
            not {*row.besides} & {*model_types}
            and _is_at(row, model_types, method, format_name)
            and re.search(row.modules, module)
            for row in self.plain
        )

    def met(self, written: Written) -> Iterator[Limit]:
        """The limits that something written meets."""
        for limit in self.limits:
            if limit.kept and not _finds(limit.kept, written.kept):
                continue
            if limit.in_mixes and not written.is_mixed:
                continue
            of_experts = limit.modules is None
            for name in written.experts if of_experts else written.linears:
                if not _is_at(limit, written.model_types, written.method, name):
                    continue
                if of_experts or _finds(limit.modules or "", written.linears[name]):
                    yield limit
                    break


def _finds(pattern: str, modules: Sequence[str]) -> bool:
    return any(re.search(pattern, module) for module in modules)


def _is_at(row: Plain | Limit, model_types: Sequence[str], method: str, format_name: str) -> bool:
    return (
        (not row.model_types or any(name in row.model_types for name in model_types))
        and (not row.methods or method in row.methods)
        and (not row.formats or format_name in row.formats)
    )
