"""The Triton kernels of `gpu`: one reads the largest magnitudes, two round to the formats.

What must hold for the bytes to be those of the torch codecs:

- A quotient that decides a code is the one that IEEE division gives. Triton's `/` is
  approximate on GPUs. `tl.div_rn` is exact but takes some 14 instructions, too many for one
  division for each weight; it makes one reciprocal for each scale, and `_divide` the quotients.
- No product and sum become one operation, but where `tl.fma` says so: kernels are launched with
  ``enable_fp_fusion=False``.
- Nothing flushes subnormals: none of these operations does in PTX, unless asked to.
- FP8 is rounded in integers, for Triton converts to float8_e4m3fn from sm_89 on only.

Tiles are [rows, columns] of one matrix. Where two codes share a byte, columns come in pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pack_pairs", "round_bytes", "row_amax"]

_BLOCK_ROWS: tl.constexpr = tl.constexpr(128)  # of fp8_block
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
_E4M3_MIN: tl.constexpr = tl.constexpr(2.0**-9)
_EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)
# Between 2**23 and 2**24, where float32 has whole numbers only; its last bits are zero.
_WHOLE: tl.constexpr = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _float(bits, DTYPE: tl.constexpr):
    """The float32 of what the low bits hold."""
    if DTYPE == "bf16":
        return _from_bits(bits.to(tl.int32) << 16)
    elif DTYPE == "fp16":
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return _from_bits(bits.to(tl.int32))


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """The matrix, rows and columns of this program: those that run at once lie together."""
    n = tl.program_id(0) if ROWS_FIRST else tl.program_id(1)
    k = tl.program_id(1) if ROWS_FIRST else tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    return batch, n * ROWS + tl.arange(0, ROWS), k * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _scale_of(amax, largest: tl.constexpr):
    """`formats.amax.scale_of`."""
    scale = tl.maximum(tl.div_rn(amax, largest), _SMALLEST_NORMAL)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def _e8m0(amax, largest: tl.constexpr):
    """`formats.e8m0.encode`, and the inverse of the power of two, for 6 and 448.

    6 is 1.5 * 2**2, 448 is 1.75 * 2**8.
    """
    if largest == 6:
        byte = ((_bits(amax) + 0x3FFFFF) >> 23) - 2
    else:
        byte = ((_bits(amax) + 0x1FFFFF) >> 23) - 8
    byte = tl.maximum(byte, 0)
    return byte, _from_bits((254 - byte) << 23)


@triton.jit
def _divisor(scale):
    """What `_divide` needs of a scale: power, scale times power, and the reciprocal of that.

    The power of two brings the scale near 1, so that no step of the division leaves the normal
    numbers where the quotient is more than a format rounds to zero.
    """
    exponent = tl.maximum(_bits(scale) & _EXPONENT, 1 << 23)
    power = _from_bits((254 << 23) - exponent)
    near_one = scale * power
    return power, near_one, tl.div_rn(1.0, near_one)


@triton.jit
def _divide(weight, power, near_one, inverse, DTYPE: tl.constexpr):
    """weight / scale as IEEE rounds it, if that is at least 2**-12; else something as small.

    A product with the correctly rounded reciprocal is at most two units from the quotient, and
    a step of Markstein's with its exact remainder gives the correctly rounded one from less
    than a unit away (Handbook of Floating-Point Arithmetic, 4.7). One step is enough for
    every pair of a bf16 or fp16 significand and a float32 one: all 2**33 were tried.
    """
    weight = weight * power
    quotient = weight * inverse
    quotient = tl.fma(tl.fma(quotient, -near_one, weight), inverse, quotient)
    if DTYPE == "fp32":
        quotient = tl.fma(tl.fma(quotient, -near_one, weight), inverse, quotient)
    return quotient


@triton.jit
def _e4m3(value):
    """The magnitude rounded to E4M3, half to even: its code in the low byte, and its value.

    The sum with 2**(e + 20) has E4M3's spacing, and its last bits count the steps.
    """
    value = tl.minimum(tl.abs(value), _E4M3_MAX)
    magic = (_bits(tl.maximum(value, 2.0**-6)) & _EXPONENT) + (20 << 23)
    total = value + _from_bits(magic)
    return _bits(total) + (magic >> 20) - 8 * (121 + 20), total - _from_bits(magic)


@triton.jit
def _e2m1(value):
    """`_WHOLE` plus the code of a magnitude rounded to E2M1, half to even.

    Codes are steps of 1/2 up to 2, of 1 up to 4 and of 2 up to 6. Longer steps count fewer, so
    the code is the least of the three counts, each rounded by its sum.
    """
    value = tl.abs(value)
    halves = tl.fma(value, 2.0, _WHOLE)
    ones = value + (_WHOLE + 2.0)
    twos = tl.fma(value, 0.5, _WHOLE + 4.0)
    return tl.minimum(tl.minimum(halves, ones), tl.minimum(twos, _WHOLE + 7.0))


@triton.jit
def _pack(low, high, low_sign, high_sign):
    """The bytes of two codes, low bits of floats, with the sign bits of other floats."""
    codes = _bits(low) + (_bits(high) << 4)
    return codes | ((_bits(low_sign) >> 28) & 8) | ((_bits(high_sign) >> 24) & 0x80)


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
    found = _bits(_float(tl.max(largest, axis=1), DTYPE))
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
    at = weight + batch * stride_b + rows.to(tl.int64)[:, None] * stride_n
    if WORDS:
        word = tl.load(at + columns[None, :], mask=inside, other=0)
        even = _float(word, DTYPE)
        odd = _float(word >> (32 if DTYPE == "fp32" else 16), DTYPE)
    else:
        at = at + columns.to(tl.int64)[None, :] * (2 * stride_k)
        even = _float(tl.load(at, mask=inside, other=0), DTYPE)
        odd = _float(tl.load(at + stride_k, mask=inside, other=0), DTYPE)
    even = tl.reshape(even, (ROWS, COLUMNS // BLOCK, BLOCK))
    odd = tl.reshape(odd, (ROWS, COLUMNS // BLOCK, BLOCK))
    amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=2)
    if FORMAT == "mxfp4":
        stored, inverse = _e8m0(amax, 6)
        even *= inverse[:, :, None]
        odd *= inverse[:, :, None]
        # The sum makes -0.0 positive.
        packed = _pack(_e2m1(even), _e2m1(odd), even + 0.0, odd + 0.0)
    else:
        if FORMAT == "nvfp4":
            global_scale = tl.load(scale + batch)
            rounded = tl.div_rn(amax, 6.0 * global_scale)
            rounded = tl.maximum(tl.where(rounded == 0, 1.0, rounded), _E4M3_MIN)
            stored, rounded = _e4m3(rounded)
            divisor = rounded * global_scale
        else:
            bits = _bits(_scale_of(amax, 7.5))
            stored = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # bf16, half to even
            divisor = _from_bits(stored << 16)
        power, near_one, inverse = _divisor(divisor[:, :, None])
        low = _divide(even, power, near_one, inverse, DTYPE)
        high = _divide(odd, power, near_one, inverse, DTYPE)
        if FORMAT == "nvfp4":
            # The sum is below zero where the quotient, rounded to float32, is: beyond -2**-150.
            # Powers of two keep both sides exact, or make one as good as infinitely larger.
            least = divisor[:, :, None] * 2.0**-50
            even, odd = tl.fma(even, 2.0**100, least), tl.fma(odd, 2.0**100, least)
            packed = _pack(_e2m1(low), _e2m1(high), even, odd)
        else:
            low = tl.minimum(tl.maximum(low, -8.0), 7.0) + (_WHOLE + 8.0)
            high = tl.minimum(tl.maximum(high, -8.0), 7.0) + (_WHOLE + 8.0)
            packed = _bits(low) + (_bits(high) << 4)
    packed = tl.reshape(packed.to(tl.uint8), (ROWS, COLUMNS))
    tl.store(qweight + row[:, None] * PAIRS + columns[None, :], packed, mask=inside)
    blocks = tl.min(tl.reshape(columns, (COLUMNS // BLOCK, BLOCK)), axis=1) // BLOCK
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
    value = _float(tl.load(at, mask=inside, other=0), DTYPE)
    if FORMAT == "mxfp8":
        blocks = tl.reshape(value, (ROWS, COLUMNS // 32, 32))
        byte, inverse = _e8m0(tl.max(tl.abs(blocks), axis=2), 448)
        quotient = tl.reshape(blocks * inverse[:, :, None], (ROWS, COLUMNS))
        block = tl.min(tl.reshape(columns, (COLUMNS // 32, 32)), axis=1) // 32
        at_scale = block_scale + row[:, None] * (K // 32) + block[None, :]
        inside_scale = (rows < N)[:, None] & (block < K // 32)[None, :]
        tl.store(at_scale, byte.to(tl.uint8), mask=inside_scale)
    else:
        if FORMAT == "fp8_block":
            divisor = _scale_of(tl.max(tl.max(tl.abs(value), axis=1), axis=0), 448.0)
            tile_row, tile_column = tl.min(rows, axis=0) // ROWS, tl.min(columns, axis=0) // COLUMNS
            tile = batch * tl.cdiv(N, ROWS) + tile_row
            tl.store(block_scale + tile * tl.cdiv(K, COLUMNS) + tile_column, divisor)
        elif FORMAT == "fp8_tensor":
            divisor = tl.load(scale + batch)
        else:
            divisor = tl.load(scale + row, mask=rows < N, other=1.0)[:, None]
        power, near_one, inverse = _divisor(divisor)
        quotient = _divide(value, power, near_one, inverse, DTYPE)
    if FORMAT == "int8_channel":
        code = _bits(tl.minimum(tl.maximum(quotient, -128.0), 127.0) + _WHOLE)
    else:
        code, _ = _e4m3(quotient)
        code ^= (_bits(value) >> 24) & 0x80
    at_code = qweight + row[:, None] * K + columns[None, :]
    tl.store(at_code, code.to(tl.uint8), mask=inside)
