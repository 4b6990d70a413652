"""The codecs with the scales that they are given."""

from __future__ import annotations

import torch

from moe_ckpt.formats import QuantFormat
from moe_ckpt.formats.amax import abs_max
from moe_ckpt.formats.scales import scale_of


def scale_for(row: QuantFormat, amax: torch.Tensor) -> torch.Tensor | None:
    """What scales of matrices or rows become of amax; None where all belong to blocks."""
    return torch.from_numpy(scale_of(amax.numpy(), row.largest)) if row.largest else None


def amax_for(row: QuantFormat, weight_BNK: torch.Tensor) -> torch.Tensor:
    return abs_max(weight_BNK) if row.amax_of_rows else abs_max(weight_BNK.flatten(1))


def encode(row: QuantFormat, weight_BNK: torch.Tensor, amax: torch.Tensor | None = None):
    """All parts of the weights, the scale of the matrix included."""
    scale = scale_for(row, amax_for(row, weight_BNK) if amax is None else amax)
    parts = row.codec().quantize(weight_BNK, scale)
    if row.largest and not row.amax_of_rows:
        parts["global_scale"] = scale
    return parts
