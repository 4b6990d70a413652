"""What a finished conversion tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .plan import Plan

__all__ = ["Result"]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished conversion.

    ``resumed``: how many shards an earlier run had made. ``was_complete``: whether it had left
    nothing to do. ``inexact_blocks``: blocks of MXFP4 that NVFP4 could not hold exactly,
    or of NVFP4 that were rounded again under the global scale that they share.
    ``verified``: what `moe_ckpt.verify` looked at -> how many; empty if it was not asked.
    """

    plan: Plan
    out_dir: Path
    device: str
    seconds: float
    resumed: int = 0
    was_complete: bool = False
    inexact_blocks: int = 0
    verified: Mapping[str, int] = field(default_factory=dict)
