"""What codecs share whose scales all belong to blocks or rows."""

from __future__ import annotations

import torch

__all__ = ["input_scale", "weight_scales"]


def weight_scales(_amax_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Nothing: no part is a scalar."""
    return {}


def input_scale(_amax_B: torch.Tensor) -> torch.Tensor:
    """Nothing asks for it: no row with such a codec has ``input_scale``."""
    raise NotImplementedError("the format has no static activation scale")
