"""A finished conversion as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import show
from ..limits import Limits
from ..result import Result
from ..words import count_of, counted
from .plan_report import plan_document
from .text import left_out_lines, size

__all__ = ["result_document", "result_lines"]


def result_document(result: Result, limits: Limits | None = None) -> dict[str, Any]:
    """The document of the plan, with what became of it as ``result``."""
    done = {
        "out_dir": str(result.out_dir),
        "device": result.device,
        "seconds": result.seconds,
        "resumed_shards": result.resumed,
        "was_complete": result.was_complete,
        "verified": dict(result.verified),
    }
    return plan_document(result.plan, limits) | {"result": done}


def result_lines(result: Result) -> Iterator[str]:
    """A finished conversion as lines of text."""
    plan = result.plan
    if result.was_complete:
        yield f"already complete: {show(result.out_dir)}"
        yield from left_out_lines(plan.left_out)
        return
    copied = sum(count for count, _ in plan.kept.values())
    made = ", ".join(f"{count_of(n, 'matrix')} {name}" for name, n in plan.formats.items())
    yield (
        f"{made}, {count_of(copied, 'tensor')} copied; {size(plan.source_nbytes)} -> "
        f"{size(plan.tensors_nbytes)} in {count_of(len(plan.shards), 'shard')}"
    )
    kinds = [f"{len(texts)} on {kind}" for kind, texts in plan.warnings_by_kind.items() if texts]
    yield (
        f"{result.seconds:.1f} s on {result.device}, "
        f"{size(plan.read_nbytes / max(result.seconds, 1e-9))}/s; "
        f"warnings: {', '.join(kinds) or 'none'}"
    )
    if result.inexact_blocks:
        yield (
            f"{count_of(result.inexact_blocks, 'block')} of MXFP4 could not be held exactly by "
            "NVFP4: their exponents are too far below the largest of their matrix"
        )
    if result.verified:
        yield f"verified: {', '.join(counted(result.verified))}"
    yield from left_out_lines(plan.left_out)
    yield f"written to {show(result.out_dir)}"
