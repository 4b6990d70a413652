"""NVFP4 from MXFP4, weight for weight the same.

    role          dtype    shape      value
    global_scale  float32  []         2**g with g = largest exponent - 8, at least -126
    block_scale   e4m3     [N, K/16]  2**(e - g), at least 2**-9
    qweight       uint8    [N, K/2]   the codes as they are

Both halves of an MXFP4 block keep its exponent e. E4M3 has the powers of two from 2**-9 to 2**8,
so every block from 2**17 below the largest one on is exact. A smaller block gets scale 2**-9 and
its codes are rounded, half to even; unless all of them are still exact, it counts as inexact. The
largest exponent is that of ModelOpt (shard_cast_utils.py, k_max), but for one thing: it ignores
blocks with byte 0, here it is the blocks without any value but zero. Those have block scale 1.0,
and matrices of nothing else have global scale 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import e2m1, e8m0, mxfp4, nvfp4
from .scratch import Scratch

__all__ = ["NO_EXPONENT", "cast", "global_scale", "max_exponent"]

NO_EXPONENT = -e8m0.BIAS - 1  # of a matrix of zeros: below all there are
_E4M3_MAX_EXPONENT, _E4M3_MIN_EXPONENT = 8, -9
_FLOAT32_MIN_EXPONENT = -126
_MAGNITUDES, _SIGNS = 0x77, 0x88  # of two codes
_BYTES = mxfp4.BLOCK // 2


def _is_zero(qweight: torch.Tensor) -> torch.Tensor:
    """Whether a block has no value but zero: bool [B, N, K/32] of qweight [B, N, K/2]."""
    words = (qweight.contiguous() & _MAGNITUDES).view(torch.int64)
    return ~words.view(*words.shape[:-1], -1, _BYTES // 8).any(-1)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    return e8m0.decode((exponent + e8m0.BIAS).to(torch.uint8))


def _global_exponent(exponent_max_B: torch.Tensor) -> torch.Tensor:
    g = (exponent_max_B - _E4M3_MAX_EXPONENT).clamp_(min=_FLOAT32_MIN_EXPONENT)
    return g.masked_fill_(exponent_max_B == NO_EXPONENT, 0)


def max_exponent(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The largest exponent of each matrix, int32 [B], `NO_EXPONENT` if all is zero.

    Matrices that share a global scale need the largest of theirs. 128: a scale is NaN.
    """
    exponent = parts["block_scale"].view(torch.uint8).int() - e8m0.BIAS
    exponent.masked_fill_(_is_zero(parts["qweight"]), NO_EXPONENT)
    return exponent.amax((1, 2))


def global_scale(exponent_max_B: torch.Tensor) -> torch.Tensor:
    """The global scale, float32 [B], for largest exponents int32 [B]."""
    return _power(_global_exponent(exponent_max_B))


def cast(
    parts: Mapping[str, torch.Tensor],
    exponent_max_B: torch.Tensor,
    out: Mapping[str, torch.Tensor] | None = None,
    scratch: Scratch | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """Cast B matrices.

    Args:
        parts: of MXFP4: qweight uint8 [B, N, K/2] and block_scale uint8 [B, N, K/32].
        exponent_max_B: int32, at least `max_exponent` of the parts.
        out: where to put the result, by role.
        scratch: where to keep temporaries.

    Returns:
        qweight uint8 [B, N, K/2] and block_scale e4m3 [B, N, K/16], and how many blocks of 32
        do not stand for the same weights as before.
    """
    packed = parts["qweight"]
    qweight = out["qweight"].copy_(packed) if out else packed.clone()
    exponent = parts["block_scale"].view(torch.uint8).int() - e8m0.BIAS
    exponent -= _global_exponent(exponent_max_B).view(-1, 1, 1)
    exponent.masked_fill_(_is_zero(packed), 0)
    inexact = 0
    small = exponent < _E4M3_MIN_EXPONENT
    if small.any():
        codes = packed.view(*small.shape, _BYTES)[small]
        down = (exponent[small] - _E4M3_MIN_EXPONENT).clamp_(min=-e8m0.BIAS // 2)
        exact = e2m1.decode(codes) * _power(down).unsqueeze(-1)
        rounded = e2m1.encode(exact.abs(), None, scratch) | (codes & _SIGNS)
        inexact = int((e2m1.decode(rounded) != exact).any(-1).sum())
        qweight.view(*small.shape, _BYTES)[small] = rounded
        exponent.clamp_(min=_E4M3_MIN_EXPONENT)
    scale = _power(exponent).repeat_interleave(mxfp4.BLOCK // nvfp4.BLOCK, -1)
    block_scale = scale.to(torch.float8_e4m3fn)
    if out:
        block_scale = out["block_scale"].copy_(block_scale)
    return {"qweight": qweight, "block_scale": block_scale}, inexact
