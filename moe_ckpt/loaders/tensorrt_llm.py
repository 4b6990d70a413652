"""TensorRT-LLM's loader."""

from __future__ import annotations

from ..runtimes import TRTLLM
from .loader import Loader

__all__ = ["TENSORRT_LLM_LOADER"]

TENSORRT_LLM_LOADER = Loader(TRTLLM, "1.2")
