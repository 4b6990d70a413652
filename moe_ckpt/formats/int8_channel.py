"""8-bit integers with a float32 scale for each row.

    role           dtype    shape   value
    channel_scale  float32  [N, 1]  row amax / 127.5
    qweight        int8     [N, K]  weight / channel_scale, half to even, in [-128, 127]

A weight is qweight * channel_scale. The divisor is compressed-tensors' (helpers.py,
calculate_qparams: half of the range from -128 to 127). A row of zeros has scale 1.0, and no
scale is below the smallest normal float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
        qweight int8 [B, N, K] and channel_scale float32 [B, N, 1].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    channel_scale = scale_BN.unsqueeze(-1)
    scaled = scratch.empty("scaled", tuple(weight_BNK.shape), torch.float32).copy_(weight_BNK)
    scaled /= channel_scale
    scaled.round_().clamp_(-128, 127)
    return {
        "qweight": placed(out, "qweight", scaled, torch.int8),
        "channel_scale": placed(out, "channel_scale", channel_scale, torch.float32),
    }


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight and channel_scale, a float of any width."""
    return parts["qweight"].float() * parts["channel_scale"].float()
