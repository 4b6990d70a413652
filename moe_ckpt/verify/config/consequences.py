"""What structure and scales do to the answers of the runtimes: some load it and compute garbage."""

from __future__ import annotations

from ..findings import ERROR, Finding, Findings, Runtime

__all__ = ["tell_garbage"]


def tell_garbage(findings: Findings) -> None:
    """Say of each runtime that loads the checkpoint what makes it compute garbage, if anything."""
    harmful = [found for found in findings.of_grade(ERROR) if found.harms]
    findings.runtimes[:] = [_after(runtime, harmful) for runtime in findings.runtimes]


def _after(runtime: Runtime, harmful: list[Finding]) -> Runtime:
    found = [finding for finding in harmful if runtime.name in finding.harms]
    if not found or not runtime.loads:
        return runtime
    more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
    return runtime._replace(garbage=f"{found[0].where} is wrong or missing{more}")
