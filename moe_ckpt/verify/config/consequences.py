"""What structure and scales do to the answers of the runtimes: they stop, or compute garbage."""

from __future__ import annotations

from ...dialects.config import CONFIG
from ..findings import ERROR, Finding, Findings, Runtime

__all__ = ["tell_consequences"]


def tell_consequences(findings: Findings) -> None:
    """Say of each runtime that could load the checkpoint what makes it stop or compute garbage."""
    stopping = [found for found in findings.found if found.stops]
    harmful = [found for found in findings.of_grade(ERROR) if found.harms]
    findings.runtimes[:] = [_after(runtime, stopping, harmful) for runtime in findings.runtimes]


def _after(runtime: Runtime, stopping: list[Finding], harmful: list[Finding]) -> Runtime:
    if not runtime.loads:
        return runtime
    stops = next((finding for finding in stopping if runtime.name in finding.stops), None)
    if stops:
        where = stops.where if stops.where != CONFIG else f"{CONFIG}, which {stops.problem}"
        return runtime._replace(why_not=f"it stops at {where}", garbage="")
    found = [finding for finding in harmful if runtime.name in finding.harms]
    if not found:
        return runtime
    more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
    return runtime._replace(garbage=f"{found[0].where} is wrong or missing{more}")
