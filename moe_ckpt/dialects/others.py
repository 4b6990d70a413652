"""The ``quant_method``s that no dialect here writes: what they hold, and how they are read.

    method      format       tensors
    fbgemm_fp8  fp8-channel  as in `fp8`
    mxfp8       mxfp8        as in `fp8`
    mxfp4       mxfp4        NAME_blocks, uint8 [E, N, K/32, 16], two codes in a byte, and
                             NAME_scales, uint8 [E, N, K/32], powers of two

The last is gpt-oss as it is released; NAME is the experts' gate_up_proj or down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtimes import RUNTIMES
from .dialect import Spelling
from .fp8.read import read_lists
from .fp8.table import CHANNEL, KEPT, MXFP8
from .matching import Built
from .reading import Reading, texts_of

__all__ = ["GPT_OSS", "read_fbgemm", "read_mxfp4", "read_mxfp8"]

GPT_OSS = Spelling(
    "mxfp4",
    "MXFP4, as gpt-oss is released",
    {"qweight": "blocks", "block_scale": "scales"},
    RUNTIMES,
)


def read_fbgemm(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``fbgemm_fp8`` says to a reading."""
    read_lists(said, CHANNEL.format, reading)


def read_mxfp8(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``mxfp8`` says to a reading."""
    read_lists(said, MXFP8.format, reading)


def read_mxfp4(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``mxfp4`` says: all runtimes quantize the experts, and read no list for them."""
    reading.entries = texts_of(said.get(KEPT), KEPT, reading)

    def read(module: Built) -> str | None:
        return GPT_OSS.format if module.is_experts else None

    reading.readers = dict.fromkeys(RUNTIMES, read)
