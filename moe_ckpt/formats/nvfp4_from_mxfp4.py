"""NVFP4 from MXFP4, weight for weight the same.

    role          dtype    shape      value
    global_scale  float32  []         2**g with g = largest exponent - 8, at least -126
    block_scale   e4m3     [N, K/16]  2**(e - g), at least 2**-9
    qweight       uint8    [N, K/2]   the codes as they are

Both halves of an MXFP4 block keep its exponent e. E4M3 has the powers of two from 2**-9 to 2**8,
so every block from 2**17 below the largest one on is exact. A smaller block gets scale 2**-9 and
its codes are rounded, half to even; unless all of them are still exact, it counts as inexact. The
largest exponent is that of ModelOpt (shard_cast_utils.py, k_max), but for one thing: it ignores
blocks with byte 0, here it is the blocks without any value but zero. Those have block scale 1.0,
and matrices of nothing else have global scale 1.0.

Only bytes are moved and counted, so this is numpy on the host, whatever the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_EXPONENT", "cast", "global_scale", "max_exponent"]

_BIAS = 127
NO_EXPONENT = -_BIAS - 1  # of a matrix of zeros: below all there are
_E4M3_MAX_EXPONENT, _E4M3_MIN_EXPONENT = 8, -9
_FLOAT32_MIN_EXPONENT = -126
_MAGNITUDES = 0x77  # of two codes
_BYTES = 16  # of the codes of a block of 32


def _halved() -> NDArray[np.uint8]:
    """The code of each E2M1 value / 2**d, half to even, for d from 0 to 5, where all are 0."""
    values = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    midpoints = (values[1:] + values[:-1]) / 2
    smaller = values / 2.0 ** np.arange(6)[:, None, None]
    odd = np.arange(7)[:, None] % 2 == 1  # a tie goes up from an odd code
    beyond = (smaller > midpoints[:, None]) | (odd & (smaller == midpoints[:, None]))
    magnitude = beyond.sum(1).astype(np.uint8)
    return np.concatenate((magnitude, magnitude | 8), 1)


_HALVED = _halved()
_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int64)  # of codes, in halves


def _is_zero(qweight: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether a block has no value but zero: bool [B, N, K/32] of qweight [B, N, K/2]."""
    words = (np.ascontiguousarray(qweight) & _MAGNITUDES).view(np.uint64)
    largest: NDArray[np.uint64] = words.reshape(*words.shape[:-1], -1, _BYTES // 8).max(-1)
    return np.equal(largest, 0)


def _global_exponent(exponent_max_B: NDArray[np.int32]) -> NDArray[np.int32]:
    g = np.maximum(exponent_max_B - _E4M3_MAX_EXPONENT, _FLOAT32_MIN_EXPONENT)
    return np.where(exponent_max_B == NO_EXPONENT, 0, g).astype(np.int32)


def max_exponent(parts: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.int32]:
    """The largest exponent of each matrix, int32 [B], `NO_EXPONENT` if all is zero.

    Matrices that share a global scale need the largest of theirs. 128: a scale is NaN.
    """
    exponent = parts["block_scale"].astype(np.int32) - _BIAS
    exponent[_is_zero(parts["qweight"])] = NO_EXPONENT
    largest: NDArray[np.int32] = exponent.max((1, 2))
    return largest


def global_scale(exponent_max_B: NDArray[np.int32]) -> NDArray[np.float32]:
    """The global scale, float32 [B], for largest exponents int32 [B]."""
    return np.ldexp(np.float32(1), _global_exponent(exponent_max_B))


def cast(
    parts: Mapping[str, NDArray[np.uint8]],
    exponent_max_B: NDArray[np.int32],
    out: Mapping[str, NDArray[np.uint8]],
) -> int:
    """Cast B matrices.

    Args:
        parts: of MXFP4: qweight uint8 [B, N, K/2] and block_scale uint8 [B, N, K/32].
        exponent_max_B: int32, at least `max_exponent` of the parts.
        out: where to put qweight [B, N, K/2], and the bytes of block_scale [B, N, K/16].

    Returns:
        How many blocks of 32 do not stand for the same weights as before.
    """
    packed = parts["qweight"]
    exponent = parts["block_scale"].astype(np.int32) - _BIAS
    exponent -= _global_exponent(exponent_max_B)[:, None, None]
    exponent[_is_zero(packed)] = 0
    inexact = 0
    small = exponent < _E4M3_MIN_EXPONENT
    if small.any():
        codes = packed.reshape(*small.shape, _BYTES)[small]
        down = np.minimum(_E4M3_MIN_EXPONENT - exponent[small], len(_HALVED) - 1)[:, None]
        low, high = _HALVED[down, codes & 15], _HALVED[down, codes >> 4]
        exact = [
            _VALUES[made & 7] << down == _VALUES[old & 7]
            for made, old in ((low, codes & 15), (high, codes >> 4))
        ]
        inexact = int((~(exact[0] & exact[1])).any(-1).sum())
        packed = packed.copy()
        packed.reshape(*small.shape, _BYTES)[small] = low | high << 4
        np.maximum(exponent, _E4M3_MIN_EXPONENT, out=exponent)
    np.copyto(out["qweight"], packed)
    # E4M3 of 2**e: from 2**-6 on an exponent with bias 7, below a bit of the mantissa.
    byte = np.where(exponent >= -6, (exponent + 7) << 3, 1 << (exponent + 9).clip(0, 2))
    np.copyto(out["block_scale"], byte.astype(np.uint8).repeat(2, -1))
    return inexact
