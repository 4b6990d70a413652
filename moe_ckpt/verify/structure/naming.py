"""Names that runtimes do not read: what wraps a model, adapters, doubles, and other beginnings."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import show, show_some
from ...layouts.names import (
    computed_from,
    named_twice,
    of_adapters,
    root_of,
    unread_names,
    wrapped_names,
)
from ...layouts.sizes import model_type_of
from ...layouts.wrappers import family_of_config
from ...runtimes import RUNTIMES, VLLM
from ..findings import ERROR, WARNING, Findings
from ..subject import Subject

__all__ = ["check_names"]

_UNKNOWN = (
    "runtimes stop at a name that they do not know, or drop the tensor and compute with what "
    "memory held"
)


def check_names(subject: Subject, findings: Findings) -> None:
    """Report tensors by whose names no runtime finds them, once for each cause."""
    names = list(subject.source.tensors)
    family = family_of_config(subject.config)

    def add(where: str, problem: str, effect: str = _UNKNOWN, grade: str = ERROR) -> None:
        stops = RUNTIMES if grade == ERROR else (VLLM,)
        findings.add("structure", show(where), problem, effect, grade, stops=stops)

    def of(found: Sequence[str]) -> str:
        return f"({len(found)} tensors: {show_some(found)})"

    adapters, wrapped = of_adapters(names), wrapped_names(names)
    if adapters:
        add(
            adapters[0],
            f"belongs to an adapter, such as LoRA, that is not merged into the model "
            f"{of(adapters)}",
            "runtimes stop at a name that they do not know, or compute without the adapter",
        )
    if wrapped:
        add(wrapped[0], f"has a word of what wrapped the model when it was saved {of(wrapped)}")
    if computed := computed_from(names):
        add(computed[0], f"is what PyTorch computes a weight from {of(computed)}")
    if family is None or not model_type_of(subject.config):
        return
    twice = named_twice(family, names)
    if twice:
        one, other = twice[0]
        add(
            one,
            f"is there also as {show(other)}: the same modules under two names, of which the model "
            f"has one {of([name for name, _ in twice])}",
            "runtimes stop at the name that they do not know, or load both, and what they read "
            "last counts",
        )
    known = {*adapters, *wrapped, *computed, *(name for name, _ in twice)}
    unread = [name for name in unread_names(family, names) if name not in known]
    moved = [name for name in unread if root_of(name) is not None]
    if moved and not subject.is_ours:  # a conversion may have been told the layout
        right = " or ".join(f"{root}layers" for root in family.roots)
        add(
            moved[0],
            f"does not begin as names of the model do: runtimes of {family.name} look for {right} "
            f"{of(moved)}",
        )
    rest = [name for name in unread if root_of(name) is None]
    if rest:
        add(
            rest[0],
            f"is no name that runtimes of {family.name} are known to read {of(rest)}",
            "vLLM stops at a name that it does not know, others leave it out",
            WARNING,
        )
