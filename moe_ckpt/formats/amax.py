"""Largest magnitudes, and the scale that a largest magnitude asks for."""

from __future__ import annotations

import torch

from .scratch import Scratch

__all__ = ["abs_max", "block_scale_of"]

_INT_OF_SIZE = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def abs_max(values: torch.Tensor, scratch: Scratch | None = None, dim: int = -1) -> torch.Tensor:
    """The largest magnitude along a dimension, as float32.

    Without the sign bit, IEEE floats are ordered like integers, NaN above infinity above all
    numbers: the maximum is exact, independent of order, and not finite exactly if a value was
    not. Integers are several times faster than a floating-point maximum.

    Args:
        values: bf16, fp16 or fp32 [..., K].
        scratch: where to keep temporaries.
        dim: the dimension.

    Returns:
        float32 [...].
    """
    integer, mask = _INT_OF_SIZE[values.element_size()]
    scratch = scratch or Scratch(values.device)
    magnitude = scratch.empty("magnitude", tuple(values.shape), integer)
    torch.bitwise_and(values.view(integer), mask, out=magnitude)
    return magnitude.amax(dim).view(values.dtype).float()


def block_scale_of(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """The float32 amax / largest: 1.0 where amax is 0, and at least the smallest normal number."""
    # By a tensor: CUDA divides by a Python number as a product with its rounded reciprocal
    # (BinaryDivTrueKernel.cu), and so can miss the last bit.
    scale = (amax / torch.full_like(amax, largest)).clamp_(min=_SMALLEST_NORMAL)
    return scale.masked_fill_(amax == 0, 1.0)
