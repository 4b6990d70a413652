"""Read what ``quant_method: fp8`` says of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import show
from ...runtimes import SGLANG, VLLM
from ..matching import Built, Reader
from ..reading import Reading, require_scale, texts_of
from .match import fp8_readers
from .table import BLOCKS, DEEPSEEK_FP4, KEPT

__all__ = ["read_fp8", "read_lists", "unread_mixes"]

_IGNORED = "ignored_layers"


def read_fp8(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what is said to a reading."""
    block = said.get("weight_block_size")
    found: str | None = "fp8-tensor"
    if block is not None:
        sizes = tuple(block) if isinstance(block, list) else ()
        found = BLOCKS.get(sizes) if all(isinstance(n, int) for n in sizes) else None
    if found is None:
        reading.problems.append(
            f"weight_block_size is {show(block)}; runtimes know [128, 128] and MX's [1, 32]"
        )
        return
    if said.get("activation_scheme") == "static":
        require_scale(found, reading)
    if said.get("activation_scheme") not in ("dynamic", "static"):
        reading.problems.append(
            f"activation_scheme is {show(said.get('activation_scheme'))}; expected dynamic"
        )
    read_lists(said, found, reading)
    if _experts_are_fp4(said):
        of_all = reading.readers
        reading.readers = {name: _with_fp4(read) for name, read in of_all.items()}


def _experts_are_fp4(said: Mapping[str, Any]) -> bool:
    """Whether experts are MXFP4 beside FP8, in the words of some runtime."""
    words = {"expert_dtype": "fp4", "routed_experts_quant_method": "mxfp4", "store_dtype": "mxfp4"}
    return any(said.get(key) == value for key, value in words.items())


def _with_fp4(read: Reader) -> Reader:
    def read_experts(module: Built) -> str | None:
        found = read(module)
        return DEEPSEEK_FP4.format if found and module.is_experts else found

    return read_experts


def unread_mixes(said: Mapping[str, Any]) -> list[str]:
    """What is said of experts in another format than all else, as NVFP4 beside FP8 blocks."""
    algo = said.get("moe_quant_algo")
    return [f"moe_quant_algo {show(algo)} beside FP8 cannot be read"] if algo else []


def read_lists(said: Mapping[str, Any], found: str, reading: Reading) -> None:
    """Add the lists of what is not quantized, where all else has one format.

    vLLM and SGLang look for ``ignored_layers`` first, the others only for the other key.
    """
    ignored = texts_of(said.get(_IGNORED), _IGNORED, reading)
    reading.has_list = False
    kept = texts_of(said.get(KEPT), KEPT, reading)
    reading.entries = (*ignored, *kept)
    reading.readers = fp8_readers(kept, found)
    if ignored:
        first = fp8_readers(ignored, found)
        reading.readers |= {VLLM: first[VLLM], SGLANG: first[SGLANG]}
