"""What a verification finds, and what it looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["PARTS", "Difference", "Finding", "Findings", "Runtime", "by_effect"]

# What is looked at, in this order.
PARTS = ("structure", "scales", "config", "source")


class Finding(NamedTuple):
    """Something that is wrong.

    ``part`` is one of `PARTS`. ``where`` is a tensor, module or file; ``problem`` what was expected
    there and found; ``effect`` what that does when the checkpoint is loaded.
    """

    part: str
    where: str
    problem: str
    effect: str


class Runtime(NamedTuple):
    """Whether a runtime loads the checkpoint, and why not, '' if it does."""

    name: str
    why_not: str

    @property
    def loads(self) -> bool:
        """Whether it does."""
        return not self.why_not


class Difference(NamedTuple):
    """How far a module is from its source.

    ``is_exact``: whether its bytes are those that quantizing the source again gives; None if they
    were not compared. ``snr_db``: power of the source weights over that of the error, in decibel.
    """

    module: str
    format: str
    is_exact: bool | None
    snr_db: float


@dataclass(slots=True)
class Findings:
    """All that was found, to be added to by each check.

    ``counts``: what was looked at -> how many. ``skipped``: part -> why it was not looked at.
    """

    found: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    runtimes: list[Runtime] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, part: str, where: str, problem: str, effect: str) -> None:
        """Record one finding."""
        self.found.append(Finding(part, where, problem, effect))

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.found

    def by_part(self) -> Mapping[str, list[Finding]]:
        """Part -> its findings, in the order of `PARTS`."""
        return {part: [f for f in self.found if f.part == part] for part in PARTS}


def by_effect(found: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Effect -> the findings that have it."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(finding.effect, []).append(finding)
    return groups
