"""How far a weight may be from what its code stands for.

Rounding to the nearest code leaves at most half a step at that magnitude:

    codes  step of codes of magnitude x          largest
    E2M1   2**(e - 1), e = max(floor(log2 x), 0)   6
    E4M3   2**(e - 3), e = max(floor(log2 x), -6)  448
    int4   1                                     7
    int8   1                                     127

Magnitudes beyond the largest code are cut off to it. How far they may go beyond depends on how a
scale was chosen: one in E4M3 is rounded, by a third if it is subnormal; the power of two below
the largest magnitude cuts off a quarter (OCP's MX); a search for the scale with the least error
a fifth (llm-compressor's mse observer).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .format import Codes

__all__ = ["BF16_ROUNDOFF", "largest_errors"]

# bf16 rounds by at most this, relative to the number.
BF16_ROUNDOFF = 2.0**-8

_CUT_OFF = 1.5
_EXPONENT_BITS = np.int32(0x7F800000)


def largest_errors(
    codes: Codes, magnitude: NDArray[np.float32], scale: NDArray[np.float32], slack: float
) -> NDArray[np.float32]:
    """The largest errors that rounding may leave, float32 of the shape of the weights.

    Args:
        codes: what weights are rounded to.
        magnitude: of the source weights.
        scale: what a code of 1 stands for, at each weight.
        slack: error of what was rounded before, relative to the weight.
    """
    in_codes = magnitude / scale
    if codes.is_integer:
        half_step = np.full_like(in_codes, 0.5)
    else:
        binade = (in_codes.view(np.int32) & _EXPONENT_BITS).view(np.float32)
        half_step = np.maximum(binade, np.float32(2.0**codes.least_exponent))
        half_step *= np.float32(2.0 ** -(codes.mantissa_bits + 1))
        np.minimum(half_step, np.float32(_last_half_step(codes)), out=half_step)
    beyond = in_codes - np.float32(codes.largest)
    beyond[in_codes > np.float32(codes.largest * (_CUT_OFF + slack))] = 0
    bound: NDArray[np.float32] = np.maximum(half_step, beyond, out=half_step)
    in_codes *= np.float32(slack)
    bound += in_codes
    bound *= scale
    return bound


def _last_half_step(codes: Codes) -> float:
    """Half a step at the largest code."""
    return float(2.0 ** (np.floor(np.log2(codes.largest)) - codes.mantissa_bits - 1))
