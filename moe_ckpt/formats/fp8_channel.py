"""FP8 E4M3 with a float32 scale for each row.

    role           dtype    shape   value
    channel_scale  float32  [N, 1]  row amax / 448
    qweight        e4m3     [N, K]  weight / channel_scale, clamped to +-448

A weight is qweight * channel_scale. The scales are those of ModelOpt (quant_utils.py) and
compressed-tensors (helpers.py, calculate_qparams). A row of zeros has scale 1.0, and no scale is
below the smallest normal float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e4m3
from .scratch import Scratch, placed

__all__ = ["dequantize", "quantize"]


def quantize(
    weight_BNK: torch.Tensor,
    scale_BN: torch.Tensor,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, finite.
        scale_BN: float32, the channel scales.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight e4m3 [B, N, K] and channel_scale float32 [B, N, 1].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    channel_scale = scale_BN.unsqueeze(-1)
    scaled = scratch.empty("scaled", tuple(weight_BNK.shape), torch.float32).copy_(weight_BNK)
    scaled /= channel_scale
    scaled.clamp_(-e4m3.MAX, e4m3.MAX)
    return {
        "qweight": placed(out, "qweight", scaled, torch.float8_e4m3fn),
        "channel_scale": placed(out, "channel_scale", channel_scale, torch.float32),
    }


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight and channel_scale, a float of any width."""
    return parts["qweight"].float() * parts["channel_scale"].float()
