"""The dialect of checkpoints that are not quantized: experts one by one, all in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtimes import RUNTIMES
from .config import with_quantization
from .dialect import Assignment, Dialect, plain_spelling, written

__all__ = ["DIALECT"]


def config_files(config: Mapping[str, Any], _assignment: Assignment) -> dict[str, str]:
    """The text of config.json, which says nothing of quantization."""
    return {"config.json": with_quantization(config, None)}


DIALECT = Dialect(
    name="none",
    summary="not quantized: what a model hub calls the bf16 checkpoint",
    spellings=written([plain_spelling(RUNTIMES)]),
    config_files=config_files,
    stacks=True,
)
