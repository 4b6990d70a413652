"""MXFP4: E2M1 values, and a power of two for 32 of them.

    role         dtype  shape      value
    block_scale  uint8  [N, K/32]  e + 127 with e = ceil(log2(block amax / 6)), at least -127
    qweight      uint8  [N, K/2]   E2M1 of weight / 2**e, two to a byte

A weight is code * 2**e. The exponent is ModelOpt's (mxfp4_tensor.py); dividing by a power of two
is exact, and nothing is clipped. Ties go to even and a zero is code 0, as compressed-tensors has
it; ModelOpt rounds ties toward zero and makes a zero code 8. A block of zeros has byte 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e2m1, e8m0
from .amax import abs_max
from .scratch import Scratch, placed

__all__ = ["BLOCK", "dequantize", "quantize"]

BLOCK = 32


def quantize(
    weight_BNK: torch.Tensor,
    _scale: torch.Tensor | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, finite, K a multiple of 32.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight uint8 [B, N, K/2] and block_scale uint8 [B, N, K/32].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    B, N, K = weight_BNK.shape
    blocks = weight_BNK.view(B, N, K // BLOCK, BLOCK)
    block_scale = e8m0.encode(abs_max(blocks, scratch), e2m1.MAX)
    scaled = scratch.empty("scaled", tuple(blocks.shape), torch.float32).copy_(blocks)
    scaled *= e8m0.inverse(block_scale).unsqueeze(-1)
    qweight = e2m1.encode(scaled.view(B, N, K), out["qweight"] if out else None, scratch)
    return {
        "qweight": qweight,
        "block_scale": placed(out, "block_scale", block_scale, torch.uint8),
    }


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight and block_scale."""
    scale = e8m0.decode(parts["block_scale"])
    values = e2m1.decode(parts["qweight"])
    return (values.view(*scale.shape, BLOCK) * scale.unsqueeze(-1)).flatten(-2)
