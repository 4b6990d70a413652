"""Convert Mixture-of-Experts checkpoints to quantized ones, file by file, without loading them.

>>> import moe_ckpt
>>> result = moe_ckpt.convert("in", "out", stats=["stats.json"])  # doctest: +SKIP

Importing this package imports no torch; `convert` does, unless numba does the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AmaxError,
    CheckpointError,
    EnvironmentFaultError,
    FormatError,
    InputError,
    InterruptedConversionError,
    LayoutError,
    MoeCkptError,
    OutputRefusedError,
    RecipeError,
    StatsError,
    UsageError,
    VerifyError,
)

if TYPE_CHECKING:
    from .conversion import Result, convert
    from .plan import Plan
    from .planning.options import Limits, Options
    from .planning.planner import make_plan
    from .report.plan_report import inspect

__all__ = [
    "AmaxError",
    "CheckpointError",
    "EnvironmentFaultError",
    "FormatError",
    "InputError",
    "InterruptedConversionError",
    "LayoutError",
    "Limits",
    "MoeCkptError",
    "Options",
    "OutputRefusedError",
    "Plan",
    "RecipeError",
    "Result",
    "StatsError",
    "UsageError",
    "VerifyError",
    "__version__",
    "convert",
    "inspect",
    "make_plan",
]

__version__ = "0.1.0"

_LAZY = {
    "Limits": "planning.options",
    "Options": "planning.options",
    "Plan": "plan",
    "Result": "conversion",
    "convert": "conversion",
    "inspect": "report.plan_report",
    "make_plan": "planning.planner",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
