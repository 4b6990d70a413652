"""4-bit integers with a scale for a group of 32, 64 or 128.

    role         dtype  shape         value
    block_scale  bf16   [N, K/group]  group amax / 7.5
    qweight      int32  [N, K/8]      weight / block_scale, half to even, in [-8, 7], plus 8

Element i of a row is at bits 4 * (i % 8) of its word. A weight is (code - 8) * block_scale. The
divisor is compressed-tensors' (helpers.py, calculate_qparams: half of the range from -8 to 7).
The weights are divided by the scale as it is stored, in float32. A group of zeros has scale 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .amax import abs_max, scale_of
from .scratch import Scratch, placed

__all__ = ["Int4", "of_group"]


@dataclass(frozen=True, slots=True)
class Int4:
    """The codec for groups of one size, a multiple of 8."""

    group: int

    def quantize(
        self,
        weight_BNK: torch.Tensor,
        _scale: torch.Tensor | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        scratch: Scratch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Quantize B matrices.

        Args:
            weight_BNK: bf16, fp16 or fp32, finite, K a multiple of the group.
            out: where to put the result, by role; the scales in the dtype that is there.
            scratch: where to keep temporaries.

        Returns:
            qweight int32 [B, N, K/8] and block_scale bf16 [B, N, K/group].
        """
        scratch = scratch or Scratch(weight_BNK.device)
        B, N, K = weight_BNK.shape
        groups = weight_BNK.view(B, N, K // self.group, self.group)
        limits = torch.finfo(out["block_scale"].dtype if out else torch.bfloat16)
        scale = scale_of(abs_max(groups, scratch), 7.5)
        scale.clamp_(limits.smallest_normal * limits.eps, limits.max)  # matters for fp16 only
        block_scale = placed(out, "block_scale", scale, torch.bfloat16)
        scaled = scratch.empty("scaled", tuple(groups.shape), torch.float32).copy_(groups)
        scaled /= block_scale.float().unsqueeze(-1)
        scaled.round_().clamp_(-8, 7).add_(8)
        codes = scratch.empty("codes", (B, N, K), torch.uint8).copy_(scaled.view(B, N, K))
        pairs = codes.view(torch.int16)  # little-endian: the even column is the low byte
        high = scratch.empty("high", (B, N, K // 2), torch.int16)
        pairs |= torch.bitwise_right_shift(pairs, 4, out=high)
        packed = scratch.empty("packed", (B, N, K // 2), torch.uint8).copy_(pairs)
        words = packed.view(torch.int32)
        qweight = out["qweight"].copy_(words) if out else words.clone()
        return {"qweight": qweight, "block_scale": block_scale}

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float32 weights [B, N, K] of qweight and block_scale, a float of any width."""
        bytes_ = parts["qweight"].contiguous().view(torch.uint8)
        values = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).float() - 8
        scale = parts["block_scale"].float()
        return (values.view(*scale.shape, self.group) * scale.unsqueeze(-1)).flatten(-2)


def of_group(group: int) -> Int4:
    """The codec for groups of this size."""
    return Int4(group)
