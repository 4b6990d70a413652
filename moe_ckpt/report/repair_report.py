"""A repair as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import show
from ..repairing import KINDS, Repair
from ..result import Result
from ..words import count_of, counted
from .text import size

__all__ = ["repair_document", "repair_lines", "repaired_lines"]

_SHOWN = 5


def repair_document(found: Repair, result: Result | None = None) -> dict[str, Any]:
    """A repair as one JSON document; ``result`` is null where nothing was written."""
    plan = found.plan
    done = None
    if result is not None:
        done = {
            "out_dir": str(result.out_dir),
            "seconds": result.seconds,
            "resumed_shards": result.resumed,
            "was_complete": result.was_complete,
            "rounded_blocks": result.inexact_blocks,
            "verified": dict(result.verified),
        }
    return {
        "schema": "moe-ckpt/repair",
        "version": 1,
        "digest": plan.digest() if plan else None,
        "mends": [mend._asdict() for mend in found.mends],
        "left": list(found.left),
        "write_nbytes": plan.write_nbytes if plan else 0,
        "result": done,
    }


def repair_lines(found: Repair) -> Iterator[str]:
    """What would be mended, and what would stay wrong."""
    for kind, done in KINDS.items():
        mends = [mend for mend in found.mends if mend.kind == kind]
        if not mends:
            continue
        yield f"{done[0].upper()}{done[1:]}: {len(mends):,}"
        for mend in mends[:_SHOWN]:
            yield f"  {show(mend.where)}: {mend.what}"
        if len(mends) > _SHOWN:
            yield f"  and {len(mends) - _SHOWN:,} more"
    if found.left:
        yield f"Stays wrong: {len(found.left):,}"
        for problem in found.left[:_SHOWN]:
            yield f"  {problem}"
        if len(found.left) > _SHOWN:
            yield f"  and {len(found.left) - _SHOWN:,} more"
    if found.plan is not None:
        yield f"Everything else is copied: {size(found.plan.write_nbytes)} in all are written"
    elif not found.left:
        yield f"nothing to mend in {show(found.root)}; nothing is written"


def repaired_lines(result: Result) -> Iterator[str]:
    """A finished repair."""
    if result.was_complete:
        yield f"already complete: {show(result.out_dir)}"
        return
    if result.inexact_blocks:
        yield f"{count_of(result.inexact_blocks, 'block')} of NVFP4 were rounded a second time"
    if result.verified:
        yield f"verified: {', '.join(counted(result.verified))}"
    yield f"written to {show(result.out_dir)}"
