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
from .version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .inspection import inspect
    from .limits import Limits
    from .plan import Plan
    from .planning.options import Options
    from .planning.planner import make_plan
    from .repairing import repair
    from .result import Result

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
    "repair",
]

_LAZY = {
    "Limits": "limits",
    "Options": "planning.options",
    "Plan": "plan",
    "Result": "result",
    "convert": "conversion",
    "inspect": "inspection",
    "make_plan": "planning.planner",
    "repair": "repairing",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
