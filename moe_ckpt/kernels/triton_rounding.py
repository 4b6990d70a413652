"""Arithmetic of the Triton kernels, to the bit that of the torch codecs.

- A quotient that decides a code is the one that IEEE division gives. Triton's `/` is
  approximate on GPUs. `tl.div_rn` is exact but takes some 14 instructions, too many for each
  weight; it makes one reciprocal for each scale, and `divide` the quotients.
- No product and sum become one operation, but where `tl.fma` says so: kernels are launched with
  ``enable_fp_fusion=False``.
- Nothing flushes subnormals: none of these operations does in PTX, unless asked to.
- FP8 is rounded in integers, for Triton converts to float8_e4m3fn from sm_89 on only.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "E4M3_MIN",
    "WHOLE",
    "bits_of",
    "divide",
    "divisor_of",
    "e2m1",
    "e4m3",
    "e8m0",
    "from_bits",
    "pack",
    "scale_of",
    "to_float",
]

_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
E4M3_MIN: tl.constexpr = tl.constexpr(2.0**-9)
_EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)
# Between 2**23 and 2**24, where float32 has whole numbers only; its last bits are zero.
WHOLE: tl.constexpr = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def bits_of(value):
    """The bits of a float32, as int32."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    """The float32 of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_float(bits, DTYPE: tl.constexpr):
    """The float32 of what the low bits hold."""
    if DTYPE == "bf16":
        return from_bits(bits.to(tl.int32) << 16)
    elif DTYPE == "fp16":
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return from_bits(bits.to(tl.int32))


@triton.jit
def scale_of(amax, largest: tl.constexpr):
    """`formats.amax.scale_of`."""
    scale = tl.maximum(tl.div_rn(amax, largest), _SMALLEST_NORMAL)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def e8m0(amax, largest: tl.constexpr):
    """`formats.e8m0.encode`, and the inverse of the power of two, for 6 and 448.

    6 is 1.5 * 2**2, 448 is 1.75 * 2**8.
    """
    if largest == 6:
        byte = ((bits_of(amax) + 0x3FFFFF) >> 23) - 2
    else:
        byte = ((bits_of(amax) + 0x1FFFFF) >> 23) - 8
    byte = tl.maximum(byte, 0)
    return byte, from_bits((254 - byte) << 23)


@triton.jit
def divisor_of(scale):
    """What `divide` needs of a scale: power, scale times power, and the reciprocal of that.

    The power of two brings the scale near 1, so that no step of the division leaves the normal
    numbers where the quotient is more than a format rounds to zero.
    """
    power = from_bits((254 << 23) - (bits_of(scale) & _EXPONENT))
    near_one = scale * power
    return power, near_one, tl.div_rn(1.0, near_one)


@triton.jit
def divide(weight, power, near_one, inverse, DTYPE: tl.constexpr):
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
def e4m3(value):
    """The magnitude rounded to E4M3, half to even: its code in the low byte, and its value.

    The sum with 2**(e + 20) has E4M3's spacing, and its last bits count the steps.
    """
    value = tl.minimum(tl.abs(value), _E4M3_MAX)
    magic = (bits_of(tl.maximum(value, 2.0**-6)) & _EXPONENT) + (20 << 23)
    total = value + from_bits(magic)
    return bits_of(total) + (magic >> 20) - 8 * (121 + 20), total - from_bits(magic)


@triton.jit
def e2m1(value):
    """`WHOLE` plus the code of a magnitude rounded to E2M1, half to even.

    Codes are steps of 1/2 up to 2, of 1 up to 4 and of 2 up to 6. Longer steps count fewer, so
    the code is the least of the three counts, each rounded by its sum.
    """
    value = tl.abs(value)
    halves = tl.fma(value, 2.0, WHOLE)
    ones = value + (WHOLE + 2.0)
    twos = tl.fma(value, 0.5, WHOLE + 4.0)
    return tl.minimum(tl.minimum(halves, ones), tl.minimum(twos, WHOLE + 7.0))


@triton.jit
def pack(low, high, low_sign, high_sign):
    """The bytes of two codes, low bits of floats, with the sign bits of other floats."""
    codes = bits_of(low) + (bits_of(high) << 4)
    return codes | ((bits_of(low_sign) >> 28) & 8) | ((bits_of(high_sign) >> 24) & 0x80)
