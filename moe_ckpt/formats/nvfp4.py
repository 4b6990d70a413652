"""NVFP4: E2M1 values, an E4M3 scale for 16 of them, a float32 scale for the matrix.

    role          dtype    shape      value
    global_scale  float32  []         amax / (6 * 448)
    block_scale   e4m3     [N, K/16]  block amax / (6 * global_scale), in [2**-9, 448]
    qweight       uint8    [N, K/2]   E2M1 of weight / (block_scale * global_scale)
    input_scale   float32  []         activation amax / (6 * 448)

A weight is code * block_scale * global_scale. The order of operations is ModelOpt's
(nvfp4_tensor.py, get_weights_scaling_factor and quantize): the block scale is rounded to E4M3
before the weights are divided by it. A block of zeros has scale 1.0, a matrix of zeros also
global scale 1.0. A global scale is at least the smallest normal float32, for runtimes invert it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e2m1, e4m3
from .amax import abs_max
from .scratch import Scratch, placed

__all__ = ["BLOCK", "dequantize", "quantize"]

BLOCK = 16


def quantize(
    weight_BNK: torch.Tensor,
    scale_B: torch.Tensor,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> dict[str, torch.Tensor]:
    """Quantize B matrices.

    Args:
        weight_BNK: bf16, fp16 or fp32, contiguous, finite, K a multiple of 16.
        scale_B: float32, the global scales.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight uint8 [B, N, K/2] and block_scale e4m3 [B, N, K/16].
    """
    scratch = scratch or Scratch(weight_BNK.device)
    B, N, K = weight_BNK.shape
    global_scale = scale_B.view(B, 1, 1)
    blocks = weight_BNK.view(B, N, K // BLOCK, BLOCK)
    scale = abs_max(blocks, scratch) / (e2m1.MAX * global_scale)
    scale.masked_fill_(scale == 0, 1.0)
    block_scale = scale.clamp_(e4m3.MIN, e4m3.MAX).to(torch.float8_e4m3fn)
    divisor = block_scale.float() * global_scale
    scaled = scratch.empty("scaled", tuple(blocks.shape), torch.float32).copy_(blocks)
    scaled /= divisor.unsqueeze(-1)
    qweight = e2m1.encode(scaled.view(B, N, K), out["qweight"] if out else None, scratch)
    return {
        "qweight": qweight,
        "block_scale": placed(out, "block_scale", block_scale, torch.float8_e4m3fn),
    }


def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weights [B, N, K] of qweight, block_scale and global_scale [B].

    Or of global_divisor [B] instead: 1 / global_scale, as compressed-tensors stores it and divides
    the block scale by it (forward_helpers.py, _dequantize).
    """
    scale = parts["block_scale"].float()
    if "global_divisor" in parts:
        scale = scale / parts["global_divisor"].view(-1, 1, 1)
    else:
        scale = scale * parts["global_scale"].view(-1, 1, 1)
    values = e2m1.decode(parts["qweight"])
    return (values.view(*scale.shape, BLOCK) * scale.unsqueeze(-1)).flatten(-2)
