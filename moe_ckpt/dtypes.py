"""The dtypes of the safetensors format, by their names in a header."""

from __future__ import annotations

from math import prod

BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}

# Weights in one of these can be quantized; anything else is copied or refused.
FLOATS = frozenset({"BF16", "F16", "F32"})

# A matrix in one of these is quantized or packed: without its scales it means nothing.
CODES = frozenset(name for name, bits in BITS.items() if bits <= 8) - {"BOOL"}


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, dense, without padding.

    >>> nbytes_of("BF16", (2, 3)), nbytes_of("F32", ()), nbytes_of("F4", (32,))
    (12, 4, 16)
    """
    return prod(shape) * BITS[dtype] // 8


def itemsize(dtype: str) -> int:
    """Bytes of one element, at least 1: the alignment that a reader needs."""
    return max(1, BITS[dtype] // 8)
