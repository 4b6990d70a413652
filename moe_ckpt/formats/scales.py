"""Scales that belong to a whole matrix or row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["scale_of"]

_SMALLEST_NORMAL = np.finfo(np.float32).tiny


def scale_of(amax: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    """The float32 amax / largest, of the same shape.

    1.0 where amax is 0, and at least the smallest normal number, for runtimes invert scales.
    """
    scale = np.maximum(amax / np.float32(largest), _SMALLEST_NORMAL)
    return np.where(amax == 0, np.float32(1), scale)
