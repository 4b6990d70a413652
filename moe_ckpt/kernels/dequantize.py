"""Decoding on a CPU: codes times scales, as float32.

Arrays are flat with their strides, as in `quantize`; scales are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats import Part
from ..source.items import E4M3
from .elements import F32, compiled, flat, row_of

__all__ = ["KERNELS", "Kernel"]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate((_E2M1, -_E2M1))
INT4 = np.arange(-8, 8, dtype=np.float32)


@compiled
def decode_pairs(qweight: Any, scale: Any, block: int, table: Any, out: Any, shape: Any) -> None:
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
def decode_e4m3(qweight: Any, scale: Any, tile: Any, out: Any, shape: Any) -> None:
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
def decode_int8(qweight: Any, scale: Any, out: Any, shape: Any) -> None:
    """A scale for each row."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            codes, values = row_of(qweight, b, n, K), row_of(out, b, n, K)
            factor = row_of(scale, b, n, 1)[0]
            for k in range(K):
                values[k] = F32(codes[k]) * factor


# Codes as bytes [B, N, bytes of a row], their scales [B, rows, blocks], the part that holds the
# scales, and where the weights go, [B, N, K].
Kernel = Callable[[NDArray[Any], NDArray[np.float32], Part, NDArray[np.float32]], None]


def _pairs_of(table: NDArray[np.float32]) -> Kernel:
    def decode(codes: Any, scale: Any, part: Part, out: Any) -> None:
        decode_pairs(flat(codes), flat(scale), part.columns, table, flat(out), out.shape)

    return decode


def _tiles(codes: Any, scale: Any, part: Part, out: Any) -> None:
    _, N, K = out.shape
    tile = (N, K) if part.is_scalar else (part.rows, min(part.columns, K))
    decode_e4m3(flat(codes), flat(scale), tile, flat(out), out.shape)


def _int8_rows(codes: Any, scale: Any, _part: Part, out: Any) -> None:
    decode_int8(flat(codes), flat(scale), flat(out), out.shape)


# The module of a format -> what decodes it.
KERNELS: Mapping[str, Kernel] = {
    **dict.fromkeys(("nvfp4", "mxfp4"), _pairs_of(E2M1)),
    "int4": _pairs_of(INT4),
    "int8_channel": _int8_rows,
    **dict.fromkeys(("fp8_block", "fp8_channel", "fp8_tensor", "mxfp8"), _tiles),
}
