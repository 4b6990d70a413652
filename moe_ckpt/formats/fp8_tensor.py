"""FP8 E4M3 with one float32 scale for the matrix.

    role          dtype    shape   value
    global_scale  float32  []      amax / 448
    qweight       e4m3     [N, K]  weight / global_scale, clamped to +-448
    input_scale   float32  []      activation amax / 448

A weight is qweight * global_scale. The scales are ModelOpt's; the division is in float32,
where ModelOpt divides bf16 by bf16 and so rounds twice. A matrix of zeros has scale 1.0, and no
scale is below the smallest normal float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e4m3
from .scratch import Scratch, placed

__all__ = ["dequantize", "quantize"]


def quantize(
    weight_BNK: torch.Tensor,
    scale_B: torch.Tensor,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, finite.
        scale_B: float32, the global scales.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight e4m3 [B, N, K].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    scaled = scratch.empty("scaled", tuple(weight_BNK.shape), torch.float32).copy_(weight_BNK)
    scaled /= scale_B.view(-1, 1, 1)
    scaled.clamp_(-e4m3.MAX, e4m3.MAX)
    return {"qweight": placed(out, "qweight", scaled, torch.float8_e4m3fn)}


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight and global_scale [B], a float of any width."""
    return parts["qweight"].float() * parts["global_scale"].float().view(-1, 1, 1)
