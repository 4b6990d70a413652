"""bfloat16, without scales.

    role     dtype  shape   value
    qweight  bf16   [N, K]  weight, half to even

A weight is qweight. Float32 values that would round to infinity become the largest bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .scratch import Scratch

__all__ = ["dequantize", "quantize"]

_MAX = torch.finfo(torch.bfloat16).max


def quantize(
    weight_BNK: torch.Tensor,
    _scale: torch.Tensor | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Round B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, finite.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight bf16 [B, N, K].
    """
    if weight_BNK.dtype == torch.float32:
        scratch = scratch or Scratch(weight_BNK.device)
        clamped = scratch.empty("scaled", tuple(weight_BNK.shape), torch.float32)
        weight_BNK = torch.clamp(weight_BNK, -_MAX, _MAX, out=clamped)
    qweight = out["qweight"].copy_(weight_BNK) if out else weight_BNK.to(torch.bfloat16, copy=True)
    return {"qweight": qweight}


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight."""
    return parts["qweight"].float()
