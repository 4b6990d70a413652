"""The Triton kernels of `gpu`: one finds the largest magnitudes, two round to the formats.

Tiles are [rows, columns] of one matrix. Where two codes share a byte, columns come in pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rounding import (
    E4M3_MIN,
    WHOLE,
    bits_of,
    divide,
    divisor_of,
    e2m1,
    e4m3,
    e8m0,
    from_bits,
    pack,
    scale_of,
    to_float,
)

__all__ = ["pack_pairs", "round_bytes", "row_amax"]


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """The matrix, rows and columns of this program: those that run at once lie together."""
    n = tl.program_id(0) if ROWS_FIRST else tl.program_id(1)
    k = tl.program_id(1) if ROWS_FIRST else tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    return batch, n * ROWS + tl.arange(0, ROWS), k * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def row_amax(
    weight,
    amax_bits,
    N,
    K,
    stride_b,
    stride_n,
    stride_k,
    K_PER_PROGRAM,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Float32 bits of the largest magnitude of each row; of `K_PER_PROGRAM` columns at a time.

    weight: the bits of the weights. amax_bits: int32 [B, N], zeros unless ``ALONE``.
    """
    batch, rows, _ = _tile(ROWS, COLUMNS, ROWS_FIRST)
    start = (tl.program_id(1) if ROWS_FIRST else tl.program_id(0)) * K_PER_PROGRAM
    end = tl.minimum(K, start + K_PER_PROGRAM)
    at_rows = weight + batch * stride_b + rows.to(tl.int64)[:, None] * stride_n
    mask: tl.constexpr = 0x7FFFFFFF if DTYPE == "fp32" else 0x7FFF
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for k0 in range(start, end, COLUMNS):
        columns = k0 + tl.arange(0, COLUMNS)
        inside = (rows < N)[:, None] & (columns < end)[None, :]
        bits = tl.load(at_rows + columns.to(tl.int64)[None, :] * stride_k, mask=inside, other=0)
        largest = tl.maximum(largest, bits.to(tl.int32) & mask)
    found = bits_of(to_float(tl.max(largest, axis=1), DTYPE))
    at = amax_bits + batch * N + rows
    if ALONE:
        tl.store(at, found, mask=rows < N)
    else:
        tl.atomic_max(at, found, mask=rows < N, sem="relaxed")


@triton.jit
def pack_pairs(
    weight,
    scale,
    qweight,
    block_scale,
    N,
    PAIRS,
    stride_b,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    IN_THREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """nvfp4, mxfp4 and int4: two codes in a byte, a scale for ``BLOCK`` pairs of columns.

    weight: the bits of the weights, or with ``WORDS`` of pairs of them, strides in the same.
    qweight: uint8 [B, N, PAIRS]. block_scale: the bits, [B, N, PAIRS / BLOCK].
    """
    batch, rows, columns = _tile(ROWS, COLUMNS, ROWS_FIRST)
    inside = (rows < N)[:, None] & (columns < PAIRS)[None, :]
    row = batch * N + rows.to(tl.int64)
    at_rows = weight + batch * stride_b + rows.to(tl.int64)[:, None] * stride_n
    by_columns = tl.reshape(columns, (COLUMNS // BLOCK, BLOCK))
    # A thread should have all of a block, to find its scale once and without help.
    DIM: tl.constexpr = 1 if IN_THREAD else 2
    if WORDS:
        word = tl.load(at_rows + columns[None, :], mask=inside, other=0)
        even = to_float(word, DTYPE)
        odd = to_float(word >> (32 if DTYPE == "fp32" else 16), DTYPE)
    elif IN_THREAD:  # neighbours in the first and the last dimension go to other threads
        pairs = tl.trans(by_columns)[None, :, :]
        at = at_rows[:, :, None] + pairs.to(tl.int64) * (2 * stride_k)
        there = (rows < N)[:, None, None] & (pairs < PAIRS)
        even = to_float(tl.load(at, mask=there, other=0), DTYPE)
        odd = to_float(tl.load(at + stride_k, mask=there, other=0), DTYPE)
    else:
        at = at_rows + columns.to(tl.int64)[None, :] * (2 * stride_k)
        even = to_float(tl.load(at, mask=inside, other=0), DTYPE)
        odd = to_float(tl.load(at + stride_k, mask=inside, other=0), DTYPE)
    if not IN_THREAD:
        even = tl.reshape(even, (ROWS, COLUMNS // BLOCK, BLOCK))
        odd = tl.reshape(odd, (ROWS, COLUMNS // BLOCK, BLOCK))
    amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=DIM)
    if FORMAT == "mxfp4":
        stored, inverse = e8m0(amax, 6)
        even *= tl.expand_dims(inverse, DIM)
        odd *= tl.expand_dims(inverse, DIM)
        # The sum makes -0.0 positive.
        packed = pack(e2m1(even), e2m1(odd), even + 0.0, odd + 0.0)
    else:
        if FORMAT == "nvfp4":
            global_scale = tl.load(scale + batch)
            rounded = tl.div_rn(amax, 6.0 * global_scale)
            rounded = tl.maximum(tl.where(rounded == 0, 1.0, rounded), E4M3_MIN)
            stored, rounded = e4m3(rounded)
            divisor = rounded * global_scale
        else:
            bits = bits_of(scale_of(amax, 7.5))
            stored = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # bf16, half to even
            divisor = from_bits(stored << 16)
        power, near_one, inverse = divisor_of(tl.expand_dims(divisor, DIM))
        low = divide(even, power, near_one, inverse, DTYPE)
        high = divide(odd, power, near_one, inverse, DTYPE)
        if FORMAT == "nvfp4":
            # The sum is below zero where the quotient, rounded to float32, is: beyond -2**-150.
            # Powers of two keep both sides exact, or make one as good as infinitely larger.
            least = tl.expand_dims(divisor, DIM) * 2.0**-50
            even, odd = tl.fma(even, 2.0**100, least), tl.fma(odd, 2.0**100, least)
            packed = pack(e2m1(low), e2m1(high), even, odd)
        else:
            low = tl.minimum(tl.maximum(low, -8.0), 7.0) + (WHOLE + 8.0)
            high = tl.minimum(tl.maximum(high, -8.0), 7.0) + (WHOLE + 8.0)
            packed = bits_of(low) + (bits_of(high) << 4)
    packed = packed.to(tl.uint8)
    if IN_THREAD:
        packed = tl.permute(packed, (0, 2, 1))
    packed = tl.reshape(packed, (ROWS, COLUMNS))
    tl.store(qweight + row[:, None] * PAIRS + columns[None, :], packed, mask=inside)
    blocks = tl.min(by_columns, axis=1) // BLOCK
    n_blocks = PAIRS // BLOCK
    at_scale = block_scale + row[:, None] * n_blocks + blocks[None, :]
    inside = (rows < N)[:, None] & (blocks < n_blocks)[None, :]
    tl.store(at_scale, stored.to(block_scale.dtype.element_ty), mask=inside)


@triton.jit
def round_bytes(
    weight,
    scale,
    qweight,
    block_scale,
    N,
    K,
    stride_b,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """mxfp8, fp8_block, fp8_channel, fp8_tensor and int8_channel: a byte for each weight.

    weight: the bits of the weights. qweight: uint8 [B, N, K]. fp8_block has a tile for each
    program.
    """
    batch, rows, columns = _tile(ROWS, COLUMNS, ROWS_FIRST)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    row = batch * N + rows.to(tl.int64)
    at = weight + batch * stride_b + rows.to(tl.int64)[:, None] * stride_n
    at = at + columns.to(tl.int64)[None, :] * stride_k
    value = to_float(tl.load(at, mask=inside, other=0), DTYPE)
    if FORMAT == "mxfp8":
        blocks = tl.reshape(value, (ROWS, COLUMNS // 32, 32))
        byte, inverse = e8m0(tl.max(tl.abs(blocks), axis=2), 448)
        quotient = tl.reshape(blocks * inverse[:, :, None], (ROWS, COLUMNS))
        block = tl.min(tl.reshape(columns, (COLUMNS // 32, 32)), axis=1) // 32
        at_scale = block_scale + row[:, None] * (K // 32) + block[None, :]
        inside_scale = (rows < N)[:, None] & (block < K // 32)[None, :]
        tl.store(at_scale, byte.to(tl.uint8), mask=inside_scale)
    else:
        if FORMAT == "fp8_block":
            divisor = scale_of(tl.max(tl.max(tl.abs(value), axis=1), axis=0), 448.0)
            tile_row, tile_column = tl.min(rows, axis=0) // ROWS, tl.min(columns, axis=0) // COLUMNS
            tile = batch * tl.cdiv(N, ROWS) + tile_row
            tl.store(block_scale + tile * tl.cdiv(K, COLUMNS) + tile_column, divisor)
        elif FORMAT == "fp8_tensor":
            divisor = tl.load(scale + batch)
        else:
            divisor = tl.load(scale + row, mask=rows < N, other=1.0)[:, None]
        power, near_one, inverse = divisor_of(divisor)
        quotient = divide(value, power, near_one, inverse, DTYPE)
    if FORMAT == "int8_channel":
        code = bits_of(tl.minimum(tl.maximum(quotient, -128.0), 127.0) + WHOLE)
    else:
        code, _ = e4m3(quotient)
        code ^= (bits_of(value) >> 24) & 0x80
    at_code = qweight + row[:, None] * K + columns[None, :]
    tl.store(at_code, code.to(tl.uint8), mask=inside)
