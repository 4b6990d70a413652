"""Findings as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

from ..errors import show
from ..verify.findings import ERROR, GRADES, UNCHECKED, WARNING, Findings, by_effect
from ..words import count_of, counted
from .text import left_out_lines

__all__ = ["document", "lines", "outcome"]

_SHOWN = 20
_SHOWN_DIFFERENCES = 5
_HEADS = {ERROR: "WRONG", WARNING: "Warning", UNCHECKED: "Unchecked"}
_COUNTED = {ERROR: "finding", WARNING: "warning", UNCHECKED: "finding"}


def document(findings: Findings) -> dict[str, Any]:
    """Findings as one JSON document; ``snr_db`` is null where nothing was lost."""
    return {
        "schema": "moe-ckpt/verification",
        "version": 1,
        "is_clean": findings.is_clean,
        "findings": [finding._asdict() for finding in findings.found],
        "runtimes": [
            {
                "name": runtime.name,
                "loads": runtime.loads,
                "why_not": runtime.why_not,
                "garbage": runtime.garbage,
                "unknown": runtime.unknown,
            }
            for runtime in findings.runtimes
        ],
        "counts": dict(findings.counts),
        "differences": [
            found._asdict() | {"snr_db": found.snr_db if found.snr_db < inf else None}
            for found in findings.differences
        ],
        "skipped": dict(findings.skipped),
        "left_out": list(findings.left_out),
    }


def outcome(findings: Findings) -> str:
    """The outcome in a few words."""
    wrong, unchecked, warned = (findings.of_grade(g) for g in (ERROR, UNCHECKED, WARNING))
    said = []
    if wrong:
        by_part = findings.by_part(ERROR)
        parts = [f"{len(found):,} on {part}" for part, found in by_part.items() if found]
        said.append(f"{count_of(len(wrong), 'finding')}: {', '.join(parts)}")
    else:
        said.append("nothing is known to be wrong" if unchecked else "nothing is wrong")
    if unchecked:
        said.append("not all of it can be checked")
    if warned:
        said.append(count_of(len(warned), "warning"))
    return "; ".join(said)


def lines(findings: Findings, *, quiet: bool = False) -> Iterator[str]:
    """Findings as lines: what is wrong and what it does, then who loads it, then counts.

    ``quiet``: only findings.
    """
    for grade in GRADES:
        for part, found in findings.by_part(grade).items():
            for effect, alike in by_effect(found).items():
                count = count_of(len(alike), _COUNTED[grade])
                yield f"{_HEADS[grade]:<10}{part}: {count}"
                for finding in alike[:_SHOWN]:
                    yield f"  {finding.where}: {finding.problem}"
                if len(alike) > _SHOWN:
                    yield f"  and {len(alike) - _SHOWN:,} more"
                yield f"  then      {effect}"
    if quiet:
        return
    for runtime in findings.runtimes:
        verdict = "loads it" if runtime.loads else f"does not load it: {runtime.why_not}"
        if runtime.unknown:
            verdict = f"cannot be told: {runtime.unknown}"
        if runtime.loads and runtime.garbage:
            verdict = f"loads it, and computes garbage: {runtime.garbage}"
        yield f"{runtime.name:<14}{verdict}"
    if findings.counts:
        yield f"Checked   {', '.join(counted(findings.counts))}"
    yield from _difference_lines(findings)
    yield from left_out_lines(findings.left_out)
    for part, why in findings.skipped.items():
        yield f"Not done  {part}: {why}"


def _difference_lines(findings: Findings) -> Iterator[str]:
    """How far each format is from the source, and the modules that are farthest."""
    by_format: dict[str, list[float]] = {}
    for found in findings.differences:
        by_format.setdefault(found.format, []).append(found.snr_db)
    for name, snr in by_format.items():
        exact = sum(value == inf for value in snr)
        rounded = [value for value in snr if value < inf]
        said = [count_of(len(snr), "module")]
        if rounded:
            mean = sum(rounded) / len(rounded)
            said += [f"{mean:.1f} dB on average", f"{min(rounded):.1f} dB at least"]
        if exact:
            said.append(f"{exact:,} of them exactly" if rounded else "exactly the source")
        yield f"Distance  {name}: {', '.join(said)}"
    inexact = [found for found in findings.differences if found.snr_db < inf]
    worst = sorted(inexact, key=lambda found: found.snr_db)
    for found in worst[:_SHOWN_DIFFERENCES] if len(worst) > 1 else ():
        yield f"  {found.snr_db:6.1f} dB  {show(found.module)}"
