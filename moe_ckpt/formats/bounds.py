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

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BF16_ROUNDOFF", "Bound", "bound_of"]

# bf16 rounds by at most this, relative to the number.
BF16_ROUNDOFF = 2.0**-8

_CUT_OFF = 1.5
_EXPONENT_BITS = np.int32(0x7F800000)


@dataclass(frozen=True, slots=True)
class Bound:
    """The error bound of weights in codes of one kind.

    ``one`` is the byte that codes of 1 are made of, ``largest`` the largest code.
    ``mantissa_bits`` and ``least_exponent`` are those of floating-point codes; integers have the
    step 1 of floats whose exponent is always 0 and whose mantissa has no bits.
    ``least_snr_db``: what is below it is no rounding, whatever the weights.
    """

    one: int
    largest: float
    mantissa_bits: int
    least_exponent: int
    least_snr_db: float
    is_integer: bool = False

    def of(
        self, magnitude: NDArray[np.float32], scale: NDArray[np.float32], slack: float
    ) -> NDArray[np.float32]:
        """The largest errors that rounding may leave, float32 of the shape of the weights.

        Args:
            magnitude: of the source weights.
            scale: what a code of 1 stands for, at each weight.
            slack: error of what was rounded before, relative to the weight.
        """
        in_codes = magnitude / scale
        if self.is_integer:
            half_step = np.full_like(in_codes, 0.5)
        else:
            binade = (in_codes.view(np.int32) & _EXPONENT_BITS).view(np.float32)
            half_step = np.maximum(binade, np.float32(2.0**self.least_exponent))
            half_step *= np.float32(2.0 ** -(self.mantissa_bits + 1))
            np.minimum(half_step, np.float32(self._last_half_step), out=half_step)
        beyond = in_codes - np.float32(self.largest)
        beyond[in_codes > np.float32(self.largest * (_CUT_OFF + slack))] = 0
        bound: NDArray[np.float32] = np.maximum(half_step, beyond, out=half_step)
        in_codes *= np.float32(slack)
        bound += in_codes
        bound *= scale
        return bound

    @property
    def _last_half_step(self) -> float:
        """Half a step at the largest code."""
        return float(2.0 ** (np.floor(np.log2(self.largest)) - self.mantissa_bits - 1))


_E2M1 = Bound(0x22, 6.0, 1, 0, 10.0)
_E4M3 = Bound(0x38, 448.0, 3, -6, 20.0)
# Integers have the same step at all magnitudes, so that one large weight can drown the others.
_INT4 = Bound(0x99, 7.0, 0, 0, 4.0, is_integer=True)
_INT8 = Bound(0x01, 127.0, 0, 0, 10.0, is_integer=True)

_BOUNDS: Mapping[str, Bound] = {
    "nvfp4": _E2M1,
    "nvfp4-w4a16": _E2M1,
    "mxfp4": _E2M1,
    "fp8-block": _E4M3,
    "fp8-channel": _E4M3,
    "fp8-tensor": _E4M3,
    "mxfp8": _E4M3,
    "int4-g128": _INT4,
    "int4-g64": _INT4,
    "int4-g32": _INT4,
    "int8-channel": _INT8,
}


def bound_of(format_name: str) -> Bound:
    """The bound of a quantized format."""
    return _BOUNDS[format_name]
