"""The runtimes that a checkpoint is written for, by the names that people know them under."""

from __future__ import annotations

__all__ = ["RUNTIMES", "SGLANG", "TRANSFORMERS", "TRTLLM", "VLLM"]

VLLM, SGLANG, TRTLLM, TRANSFORMERS = "vLLM", "SGLang", "TensorRT-LLM", "transformers"
RUNTIMES = (VLLM, SGLANG, TRTLLM, TRANSFORMERS)
