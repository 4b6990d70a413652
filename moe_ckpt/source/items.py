"""What is stored, as numpy: the item types of safetensors, and their values.

numpy has no bf16 and no 8-bit floats; their bits stand for them, bf16 as uint16, the rest as uint8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["DTYPES", "E4M3", "numbers"]

DTYPES: dict[str, DTypeLike] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
}


def _e4m3() -> NDArray[np.float32]:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent > 0, mantissa + 8, mantissa) * 2.0 ** (np.maximum(exponent, 1) - 10)
    value[127] = np.nan
    return np.concatenate((value, -value)).astype(np.float32)


def _e8m0() -> NDArray[np.float32]:
    value = np.full(256, np.nan, np.float32)
    value[:255] = np.ldexp(np.float32(1), np.arange(255) - 127)
    return value


E4M3, _E8M0 = _e4m3(), _e8m0()


def numbers(items: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The float32 values of floats of a dtype of safetensors; bytes are powers of two, E8M0."""
    if dtype == "BF16":
        return (items.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return E4M3.take(items)
    if dtype in ("F8_E8M0", "U8"):
        return _E8M0.take(items)
    return items.astype(np.float32, copy=False)
