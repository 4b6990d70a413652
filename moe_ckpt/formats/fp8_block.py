"""FP8 E4M3 with a float32 scale for a tile of 128x128.

    role         dtype    shape                        value
    block_scale  float32  [ceil(N/128), ceil(K/128)]   tile amax / 448
    qweight      e4m3     [N, K]                       weight / block_scale, clamped to +-448

A weight is qweight * block_scale. Tiles at the edges are what is left, as if zeros followed. The
scales are those of ModelOpt (fp8_tensor.py) and DeepSeek's weight_scale_inv, which multiplies
in spite of its name. A tile of zeros has scale 1.0, and no scale is below the smallest normal
float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from . import e4m3
from .amax import abs_max, scale_of
from .scratch import Scratch, placed

__all__ = ["BLOCK", "dequantize", "quantize"]

BLOCK = 128


def _tiles(values_BNK: torch.Tensor) -> torch.Tensor:
    """A view [B, N/128, 128, K/128, 128] of what has whole tiles only."""
    B, N, K = values_BNK.shape
    return values_BNK.view(B, N // BLOCK, BLOCK, K // BLOCK, BLOCK)


def quantize(
    weight_BNK: torch.Tensor,
    _scale: torch.Tensor | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, finite.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight e4m3 [B, N, K] and block_scale float32 [B, ceil(N/128), ceil(K/128)].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    B, N, K = weight_BNK.shape
    padded = scratch.empty("scaled", (B, N + -N % BLOCK, K + -K % BLOCK), torch.float32)
    scaled = padded[:, :N, :K]
    whole = padded.shape == weight_BNK.shape
    if not whole:
        padded.zero_()
    scaled.copy_(weight_BNK)
    tiles = _tiles(padded)
    amax = abs_max(_tiles(weight_BNK) if whole else tiles, scratch).amax(2)
    block_scale = scale_of(amax, e4m3.MAX)
    tiles /= block_scale[:, :, None, :, None]
    padded.clamp_(-e4m3.MAX, e4m3.MAX)
    return {
        "qweight": placed(out, "qweight", scaled, torch.float8_e4m3fn),
        "block_scale": placed(out, "block_scale", block_scale, torch.float32),
    }


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight and block_scale, a float of any width."""
    N, K = parts["qweight"].shape[1:]
    padded = pad(parts["qweight"].float(), (0, -K % BLOCK, 0, -N % BLOCK))
    _tiles(padded).mul_(parts["block_scale"].float()[:, :, None, :, None])
    return padded[:, :N, :K].contiguous()
