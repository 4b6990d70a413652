"""FP4 E2M1: one sign bit, two exponent bits, one mantissa bit.

    code   value   exponent  mantissa
    0000   0       subnormal 0
    0001   0.5     subnormal 1
    0010   1       2**0      1.0
    0011   1.5     2**0      1.5
    0100   2       2**1      1.0
    0101   3       2**1      1.5
    0110   4       2**2      1.0
    0111   6       2**2      1.5

Codes 8 to 15 are the negatives. Two codes make a byte, the even column in the low nibble.
"""

from __future__ import annotations

import torch

__all__ = ["MAX", "VALUES", "decode", "encode"]

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXPONENT = 0x7F800000  # of a float32
_ONE = 0x3F800000  # the float32 1.0: smaller values use its exponent, E2M1's smallest
_ULP_SHIFT = 22 << 23  # 2**(e+22) has units of 2**(e-1), the spacing of E2M1 at exponent e


def encode(values: torch.Tensor) -> torch.Tensor:
    """Round float32 values to E2M1, ties to even, and pack two codes in a byte.

    Values beyond 6 become 6. A negative value that rounds to zero keeps its sign bit; -0.0
    does not, as in ModelOpt (nvfp4_tensor.py, _cast_fp4).

    Args:
        values: float32 [..., K], K even, finite. It is overwritten.

    Returns:
        uint8 [..., K/2].
    """
    # x + 2**(e+22) rounds x to E2M1's spacing in the adder, half to even; what the sum
    # gained in units of its last place, plus 2*(e-127), is the code.
    bits = values.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0
    sign = bits >> 28
    sign &= 8
    values.abs_().clamp_(max=MAX)
    magic = bits & _EXPONENT
    magic.clamp_(min=_ONE)
    sign += magic >> 22
    magic += _ULP_SHIFT
    values += magic.view(torch.float32)
    bits -= magic
    bits += sign
    bits -= 2 * 127
    pairs = bits.view(torch.int64)  # little-endian: the even column is the low half
    return pairs.bitwise_or_(pairs >> 28).to(torch.uint8)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values [..., K] of packed codes uint8 [..., K/2]."""
    table = torch.tensor(VALUES + tuple(-v for v in VALUES), device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return table[codes.int()]
