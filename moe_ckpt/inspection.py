"""What is in a checkpoint, and what a default conversion would make of it."""

from __future__ import annotations

import os
from typing import Any

from .planning.planner import make_plan
from .report.plan_report import plan_document

__all__ = ["inspect"]


def inspect(in_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a default conversion of a folder would do, as a JSON-like document.

    Reads headers only. Raises `InputError` if the checkpoint cannot be converted.
    """
    return plan_document(make_plan(in_dir, allow_requantize=True))
