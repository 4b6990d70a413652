"""Quantizing on a CPU: a kernel for each number format.

All take weights as bits (see `elements.as_number`) and results as bytes, each a flat array and its
strides in items from matrix to matrix and from row to row; rows are contiguous. ``shape`` is B, N,
K. What is computed is said in `moe_ckpt.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .elements import (
    F32,
    U32,
    as_bits,
    as_float,
    as_number,
    bf16,
    compiled,
    e2m1,
    e4m3,
    flat,
    inlined,
    largest_of_16,
    magnitude,
    of_e4m3,
    row_of,
)

__all__ = ["KERNELS", "Kernel"]


@inlined
def _largest_between(row: Any, start: int, stop: int) -> Any:
    """The largest magnitude of 16 items or a multiple of it, as bits."""
    largest = largest_of_16(row, start)
    for at in range(start + 16, stop, 16):
        largest = max(largest, largest_of_16(row, at))
    return largest


@compiled
def _largest_of_blocks(row: Any, block: int, largest: Any) -> None:
    """The largest magnitude of each block of 32 or more, a multiple of 16, as float32."""
    for i in range(largest.size):
        largest[i] = as_number(_largest_between(row, i * block, (i + 1) * block))


@inlined
def _spread(values: Any, count: int, out: Any) -> None:
    """Each value ``count`` times, so that the loop over weights has no loop in it."""
    for i in range(values.size):
        value = values[i]
        for j in range(i * count, (i + 1) * count):
            out[j] = value


@compiled
def _e2m1_row(row: Any, divisor: Any, block: int, spread: Any, codes: Any) -> None:
    """Codes of weight / divisor, two to a byte; ``spread`` is room for the divisor of each byte."""
    _spread(divisor, block // 2, spread)
    for j in range(codes.size):
        low = e2m1(as_number(row[2 * j]) / spread[j] + F32(0))  # -0.0 + 0.0 is 0.0
        high = e2m1(as_number(row[2 * j + 1]) / spread[j] + F32(0))
        codes[j] = U32(low | U32(high << U32(4)))


@compiled
def _e4m3_row(row: Any, divisor: Any, codes: Any) -> None:
    """Codes of weight / divisor, which has an item for each weight."""
    for k in range(codes.size):
        codes[k] = e4m3(as_number(row[k]) / divisor[k])


@compiled
def nvfp4(weight: Any, scale: Any, qweight: Any, block_scale: Any, shape: Any) -> None:
    """Of `formats.nvfp4`; ``scale`` is [B]."""
    B, N, K = shape
    divisor, spread = np.empty(K // 16, F32), np.empty(K // 2, F32)
    for b in range(B):
        global_scale = scale[b]
        of_six = F32(6) * global_scale
        for n in range(N):
            row = row_of(weight, b, n, K)
            scales = row_of(block_scale, b, n, K // 16)
            for i in range(K // 16):
                divisor[i] = as_number(largest_of_16(row, 16 * i))
            for i in range(K // 16):
                wanted = divisor[i] / of_six
                if wanted == F32(0):
                    wanted = F32(1)
                code = e4m3(max(wanted, F32(2.0**-9)))
                scales[i] = code
                divisor[i] = of_e4m3(code) * global_scale
            _e2m1_row(row, divisor, 16, spread, row_of(qweight, b, n, K // 2))


@compiled
def _powers(largest: Any, highest_bits: Any, bytes_: Any) -> None:
    """E8M0 of the power of two that each block asks for; the power itself replaces its largest.

    ``highest_bits`` are those of the largest value of the format.
    """
    # In integers, as `formats.e8m0.encode` has it: a mantissa beyond the format's carries.
    beyond = U32(0x7FFFFF - (highest_bits & 0x7FFFFF))
    less = U32((highest_bits >> 23) - 127)
    for i in range(largest.size):
        exponent = U32(U32(as_bits(largest[i]) + beyond) >> U32(23))
        byte = U32(max(exponent, less) - less)
        bytes_[i] = byte
        largest[i] = as_float(U32(1 << 22) if byte == U32(0) else U32(byte << U32(23)))


@compiled
def mxfp4(weight: Any, qweight: Any, block_scale: Any, shape: Any) -> None:
    """Of `formats.mxfp4`."""
    B, N, K = shape
    divisor, spread = np.empty(K // 32, F32), np.empty(K // 2, F32)
    for b in range(B):
        for n in range(N):
            row = row_of(weight, b, n, K)
            _largest_of_blocks(row, 32, divisor)
            _powers(divisor, 0x40C00000, row_of(block_scale, b, n, K // 32))  # 6
            _e2m1_row(row, divisor, 32, spread, row_of(qweight, b, n, K // 2))


@compiled
def mxfp8(weight: Any, qweight: Any, block_scale: Any, shape: Any) -> None:
    """Of `formats.mxfp8`."""
    B, N, K = shape
    divisor, spread = np.empty(K // 32, F32), np.empty(K, F32)
    for b in range(B):
        for n in range(N):
            row = row_of(weight, b, n, K)
            _largest_of_blocks(row, 32, divisor)
            _powers(divisor, 0x43E00000, row_of(block_scale, b, n, K // 32))  # 448
            _spread(divisor, 32, spread)
            _e4m3_row(row, spread, row_of(qweight, b, n, K))


@compiled
def fp8_rows(weight: Any, scale: Any, qweight: Any, shape: Any) -> None:
    """E4M3 with a scale for each row, [B, N]."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            row, codes = row_of(weight, b, n, K), row_of(qweight, b, n, K)
            divisor = scale[b, n]
            for k in range(K):
                codes[k] = e4m3(as_number(row[k]) / divisor)


@compiled
def _scale(amax: Any, largest: Any) -> Any:
    """Of `formats.scales.scale_of`."""
    return F32(1) if amax == F32(0) else max(amax / F32(largest), F32(2.0**-126))


@compiled
def _largest_of_tiles(row: Any, largest: Any) -> None:
    """Raise ``largest``, of blocks of 128 of which the last may be cut off, to that of the row."""
    whole = row.size // 128
    for i in range(largest.size):
        if i < whole:
            found = _largest_between(row, 128 * i, 128 * i + 128)
        else:
            found = magnitude(row[128 * i])
            for k in range(128 * i + 1, row.size):
                found = max(found, magnitude(row[k]))
        largest[i] = max(largest[i], as_number(found))


@compiled
def fp8_block(weight: Any, qweight: Any, block_scale: Any, shape: Any) -> None:
    """Of `formats.fp8_block`."""
    B, N, K = shape
    tiles = -(-K // 128)
    amax = np.empty(tiles, F32)
    for b in range(B):
        for band in range(-(-N // 128)):
            rows = range(128 * band, min(128 * band + 128, N))
            amax[:] = F32(0)
            for n in rows:
                _largest_of_tiles(row_of(weight, b, n, K), amax)
            scales = row_of(block_scale, b, band, tiles)
            for i in range(tiles):
                scales[i] = _scale(amax[i], 448)
            for n in rows:
                row, codes = row_of(weight, b, n, K), row_of(qweight, b, n, K)
                for i in range(K // 128):
                    divisor = scales[i]
                    for k in range(128):  # a count that the compiler knows: one third faster
                        codes[128 * i + k] = e4m3(as_number(row[128 * i + k]) / divisor)
                for k in range(K // 128 * 128, K):
                    codes[k] = e4m3(as_number(row[k]) / scales[tiles - 1])


@compiled
def int8_rows(weight: Any, scale: Any, qweight: Any, shape: Any) -> None:
    """Integers with a scale for each row, [B, N]."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            row, codes = row_of(weight, b, n, K), row_of(qweight, b, n, K)
            divisor = scale[b, n]
            for k in range(K):
                rounded = np.rint(as_number(row[k]) / divisor)
                codes[k] = np.int8(min(max(rounded, F32(-128)), F32(127)))


@compiled
def int4(weight: Any, group: int, qweight: Any, block_scale: Any, shape: Any) -> None:
    """Integers two to a byte, the even column in the low nibble; scales in bf16."""
    B, N, K = shape
    divisor, spread = np.empty(K // group, F32), np.empty(K // 2, F32)
    for b in range(B):
        for n in range(N):
            row, codes = row_of(weight, b, n, K), row_of(qweight, b, n, K // 2)
            scales = row_of(block_scale, b, n, K // group)
            _largest_of_blocks(row, group, divisor)
            for i in range(K // group):
                scales[i] = bf16(min(_scale(divisor[i], 7.5), as_float(U32(0x7F7F0000))))
                divisor[i] = as_number(scales[i])
            _spread(divisor, group // 2, spread)
            for j in range(K // 2):
                low = np.rint(as_number(row[2 * j]) / spread[j])
                high = np.rint(as_number(row[2 * j + 1]) / spread[j])
                low = min(max(low, F32(-8)), F32(7)) + F32(8)
                high = min(max(high, F32(-8)), F32(7)) + F32(8)
                codes[j] = np.uint8(low) | np.uint8(np.uint8(high) << np.uint8(4))


@compiled
def to_bf16(weight: Any, qweight: Any, shape: Any) -> None:
    """bf16, clamped to its largest number."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            row, codes = row_of(weight, b, n, K), row_of(qweight, b, n, K)
            for k in range(K):
                limit = as_float(U32(0x7F7F0000))
                codes[k] = bf16(min(max(as_number(row[k]), -limit), limit))


# The bits of weights [B, N, K], rows contiguous; scales of matrices [B] or rows [B, N], or None;
# and where the parts with rows go, by role.
Kernel = Callable[[NDArray[Any], Any, Mapping[str, NDArray[Any]]], None]


def _nvfp4(bits: Any, scale: Any, out: Mapping[str, Any]) -> None:
    nvfp4(flat(bits), scale, flat(out["qweight"]), flat(out["block_scale"]), bits.shape)


def _in_blocks(kernel: Callable[..., None]) -> Kernel:
    def quantize(bits: Any, _scale: Any, out: Mapping[str, Any]) -> None:
        kernel(flat(bits), flat(out["qweight"]), flat(out["block_scale"]), bits.shape)

    return quantize


def _int4(bits: Any, _scale: Any, out: Mapping[str, Any]) -> None:
    codes, block_scale = out["qweight"].view(np.uint8), out["block_scale"]
    group = bits.shape[2] // block_scale.shape[2]
    int4(flat(bits), group, flat(codes), flat(block_scale), bits.shape)


def _fp8_tensor(bits: Any, scale: Any, out: Mapping[str, Any]) -> None:
    of_rows = np.repeat(scale[:, None], bits.shape[1], 1)
    fp8_rows(flat(bits), of_rows, flat(out["qweight"]), bits.shape)


def _in_rows(kernel: Callable[..., None]) -> Kernel:
    def quantize(bits: Any, scale: Any, out: Mapping[str, Any]) -> None:
        kernel(flat(bits), scale, flat(out["qweight"]), bits.shape)
        out["channel_scale"][:] = scale[:, :, None]

    return quantize


def _bf16(bits: Any, _scale: Any, out: Mapping[str, Any]) -> None:
    to_bf16(flat(bits), flat(out["qweight"]), bits.shape)


# The module of a format -> what quantizes to it.
KERNELS: Mapping[str, Kernel] = {
    "nvfp4": _nvfp4,
    "mxfp4": _in_blocks(mxfp4),
    "mxfp8": _in_blocks(mxfp8),
    "fp8_block": _in_blocks(fp8_block),
    "int4": _int4,
    "fp8_tensor": _fp8_tensor,
    "fp8_channel": _in_rows(fp8_rows),
    "int8_channel": _in_rows(int8_rows),
    "bf16": _bf16,
}
