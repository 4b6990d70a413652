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

from .scratch import Scratch

__all__ = ["MAX", "VALUES", "decode", "encode"]

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Bits of a bfloat16, which is the upper half of a float32:
_EXPONENT = 0x7F80
_ONE = 0x3F80  # the exponent of 1.0; smaller values are as far apart as those from 1 to 2
_UP_22 = 22 << 7  # adds 22 to the exponent


def encode(
    values: torch.Tensor, out: torch.Tensor | None = None, scratch: Scratch | None = None
) -> torch.Tensor:
    """Round float32 values to E2M1, ties to even, and pack two codes in a byte.

    Values beyond 6 become 6. A negative value that rounds to zero keeps its sign bit; -0.0
    does not, as in ModelOpt (nvfp4_tensor.py, _cast_fp4).

    Args:
        values: float32 [..., K], K even, finite, contiguous. It is overwritten.
        out: where to put the result.
        scratch: where to keep temporaries.

    Returns:
        uint8 [..., K/2].
    """
    # x + 2**(e+22) rounds x to E2M1's spacing in the adder, half to even: the sum's last bits
    # count the steps of 2**(e-1) in x, and that count plus 2*e is the code. The exponent e may
    # come from x rounded to bfloat16: where rounding raises it, x rounds up to 2 or 4 anyway.
    # 16-bit integers take half the time of 32-bit ones.
    scratch = scratch or Scratch(values.device)
    shape = tuple(values.shape)
    values += 0.0  # -0.0 + 0.0 is +0.0
    exponent = scratch.empty("exponent", shape, torch.bfloat16).copy_(values).view(torch.int16)
    sign = torch.bitwise_right_shift(
        exponent, 12, out=scratch.empty("sign", shape, torch.int16)
    ).bitwise_and_(8)
    exponent &= _EXPONENT
    exponent.clamp_(min=_ONE)
    exponent += _UP_22
    magic = scratch.empty("magic", shape, torch.float32).copy_(exponent.view(torch.bfloat16))
    magic += values.abs_()
    code = scratch.empty("code", shape, torch.int16).copy_(magic.view(torch.int32))
    exponent >>= 6  # 2 * (e + 127 + 22)
    code += exponent
    code -= 2 * (127 + 22)
    code.clamp_(max=7)
    code += sign
    bytes_ = scratch.empty("bytes", shape, torch.uint8).copy_(code)
    pairs = bytes_.view(torch.int16)  # little-endian: the even column is the low byte
    high = torch.bitwise_right_shift(pairs, 4, out=sign[..., : shape[-1] // 2])
    pairs |= high
    return pairs.to(torch.uint8) if out is None else out.copy_(pairs)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The float32 values [..., K] of packed codes uint8 [..., K/2]."""
    # A code's bits at the top of a float16's exponent and mantissa are its value / 2**14, exactly,
    # subnormals too; a table takes four times as long.
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int16)
    bits = (codes & 7).bitwise_left_shift_(9)
    bits |= codes.bitwise_and_(8).bitwise_left_shift_(12)
    return bits.view(torch.float16).float().mul_(2.0**14)
