"""Decoding on a CPU: codes times scales, as float32.

Arrays are flat with their strides, as in `quantize`; scales are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..source.items import E4M3
from .elements import F32, compiled, row_of

__all__ = ["E2M1", "INT4", "e4m3", "int8", "pairs"]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate((_E2M1, -_E2M1))
INT4 = np.arange(-8, 8, dtype=np.float32)


@compiled
def pairs(qweight: Any, scale: Any, block: int, table: Any, out: Any, shape: Any) -> None:
    """Two codes to a byte, whose values a table of 16 tells; a scale for each block."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            codes, values = row_of(qweight, b, n, K // 2), row_of(out, b, n, K)
            scales = row_of(scale, b, n, K // block)
            for i in range(K // block):
                for j in range(i * block // 2, (i + 1) * block // 2):
                    values[2 * j] = table[codes[j] & 15] * scales[i]
                    values[2 * j + 1] = table[codes[j] >> 4] * scales[i]


@compiled
def e4m3(qweight: Any, scale: Any, tile: Any, out: Any, shape: Any) -> None:
    """A scale for each tile of rows and columns; NaN stays NaN."""
    B, N, K = shape
    rows, columns = tile
    for b in range(B):
        for n in range(N):
            codes, values = row_of(qweight, b, n, K), row_of(out, b, n, K)
            scales = row_of(scale, b, n // rows, -(-K // columns))
            for i in range(-(-K // columns)):
                for k in range(i * columns, min((i + 1) * columns, K)):
                    values[k] = E4M3[codes[k]] * scales[i]


@compiled
def int8(qweight: Any, scale: Any, out: Any, shape: Any) -> None:
    """A scale for each row."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            codes, values = row_of(qweight, b, n, K), row_of(out, b, n, K)
            factor = row_of(scale, b, n, 1)[0]
            for k in range(K):
                values[k] = F32(codes[k]) * factor
