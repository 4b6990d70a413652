"""TensorRT-LLM's loader."""

from __future__ import annotations

from ..runtimes import TRTLLM
from .everywhere import PLAIN_EVERYWHERE, ROUTER
from .loader import Loader, Plain

__all__ = ["TENSORRT_LLM_LOADER"]

TENSORRT_LLM_LOADER = Loader(TRTLLM, "1.2", plain=(*PLAIN_EVERYWHERE, Plain((), ROUTER)))
