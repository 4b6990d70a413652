"""What a verification finds, and what it looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["ERROR", "GRADES", "PARTS", "UNCHECKED", "WARNING"]
__all__ += ["Difference", "Finding", "Findings", "Runtime", "by_effect"]

# What is looked at, in this order.
PARTS = ("structure", "scales", "config", "source")

# How bad a finding is: numbers are wrong, or something stops; it works, and could be better; it is
# stored in a way that is not read here, so that nothing is known of it.
ERROR, WARNING, UNCHECKED = GRADES = ("error", "warning", "unchecked")


class Finding(NamedTuple):
    """Something that is not as it should be.

    ``part`` is one of `PARTS`. ``where`` is a tensor, module or file; ``problem`` what was expected
    there and found; ``effect`` what that does when the checkpoint is loaded. ``grade`` is one of
    `GRADES`. ``harms``: runtimes that load it all the same and compute garbage. ``stops``: those
    that do not load it.
    """

    part: str
    where: str
    problem: str
    effect: str
    grade: str = ERROR
    harms: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


class Runtime(NamedTuple):
    """Whether a runtime loads the checkpoint, and why not, '' if it does.

    ``garbage``: what makes it compute garbage, though it loads it; '' if nothing does.
    ``unknown``: why that cannot be told; '' if it can.
    """

    name: str
    why_not: str = ""
    garbage: str = ""
    unknown: str = ""

    @property
    def loads(self) -> bool:
        """Whether it is known that it does."""
        return not (self.why_not or self.unknown)


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
    ``left_out``: files and folders of the source that conversions do not copy.
    """

    found: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    runtimes: list[Runtime] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def add(
        self,
        part: str,
        where: str,
        problem: str,
        effect: str,
        grade: str = ERROR,
        *,
        harms: tuple[str, ...] = (),
        stops: tuple[str, ...] = (),
    ) -> None:
        """Record one finding."""
        self.found.append(Finding(part, where, problem, effect, grade, harms, stops))

    def of_grade(self, grade: str) -> list[Finding]:
        """The findings of one grade."""
        return [found for found in self.found if found.grade == grade]

    @property
    def is_clean(self) -> bool:
        """Whether all was checked, and nothing is wrong; there may be warnings."""
        return all(found.grade == WARNING for found in self.found)

    def by_part(self, grade: str) -> Mapping[str, list[Finding]]:
        """Part -> its findings of a grade, in the order of `PARTS`."""
        found = self.of_grade(grade)
        return {part: [f for f in found if f.part == part] for part in PARTS}


def by_effect(found: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Effect -> the findings that have it."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(finding.effect, []).append(finding)
    return groups
