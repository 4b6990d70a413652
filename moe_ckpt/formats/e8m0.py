"""E8M0: a power of two as a byte, its exponent + 127. Byte 255 is NaN and is never made.

    byte  0        1        127   254
    value 2**-127  2**-126  1     2**127

The exponent that a block asks for is ceil(log2(amax / largest)): the smallest one that clips
nothing. ModelOpt chooses the same (mxfp8_tensor.py and mxfp4_tensor.py), a block of zeros having
byte 0. compressed-tensors rounds amax down to a power of two, or up from a mantissa of 1.75 on
(mxfp_utils.py), and so clips some blocks of MXFP4.
"""

from __future__ import annotations

from math import frexp

import torch

__all__ = ["BIAS", "decode", "encode", "inverse"]

BIAS = 127
_SIGNIFICAND_BITS = 23  # of a float32, which has the same exponent bias
_QUIET_NAN = 0x7FC00000


def encode(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The byte of the smallest power of two, at least 2**-127, with amax <= largest * 2**e.

    ``largest`` is at least 2, amax float32 and finite.
    """
    # With amax = m * 2**a and largest = l * 2**b, 1 <= m, l < 2, it is a - b, plus one if m > l.
    # In integers, for log2 rounds to whole numbers near them. A subnormal amax has exponent
    # field 0 or 1 here, and what is asked for is below 2**-127 either way.
    half_l, b = frexp(largest)  # half of l, so that b is one more
    beyond_l = (1 << _SIGNIFICAND_BITS) - 1 - round((2 * half_l - 1) * (1 << _SIGNIFICAND_BITS))
    exponent = amax.view(torch.int32) + beyond_l  # carries into the exponent if m > l
    exponent >>= _SIGNIFICAND_BITS
    exponent -= b - 1
    return exponent.clamp_(min=0).to(torch.uint8)


def decode(byte: torch.Tensor) -> torch.Tensor:
    """The float32 powers of two, NaN for 255, of uint8 or float8_e8m0fnu."""
    byte = byte.view(torch.uint8)
    bits = byte.int() << _SIGNIFICAND_BITS
    bits.masked_fill_(byte == 0, 1 << (_SIGNIFICAND_BITS - 1))  # a subnormal float32
    bits.masked_fill_(byte == 255, _QUIET_NAN)
    return bits.view(torch.float32)


def inverse(byte: torch.Tensor) -> torch.Tensor:
    """The float32 2**-e of uint8 up to 253, which is more than `encode` makes."""
    return ((2 * BIAS - byte.int()) << _SIGNIFICAND_BITS).view(torch.float32)
