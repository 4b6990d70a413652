"""NVFP4 under another global scale, which runtimes want of matrices that they build as one.

    role          dtype  shape      value
    block_scale   e4m3   [N, K/16]  block_scale * ratio, half to even, at least 2**-9
    qweight       uint8  [N, K/2]   E2M1 of weight / (the new block_scale * the new global scale)

The ratio is the old global scale over the new one, which must not be smaller. Where E4M3 holds
block_scale * ratio, as it does for most powers of two, the codes stay and every weight is what it
was. Elsewhere the block scale is rounded, by a sixteenth at most, and the codes of E2M1, which lie
farther apart, still stay: only where the block scale would be subnormal do codes change too, half
to even. Blocks of zeros stay as they are.

A ratio is given as numerator and denominator, float32 each: products of these with a scale and a
code are whole in float64, so that every comparison here is exact. Only bytes are looked up and
counted, so this is numpy on the host, whatever the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["exact_scales", "rescale"]

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

_BYTES = 8  # of the codes of a block
_MAGNITUDES = 0x7777777777777777  # of the codes of a block
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _e4m3() -> Floats:
    """The values of the bytes 0 to 126, which are those without a sign."""
    byte = np.arange(127)
    exponent, mantissa = byte >> 3, byte & 7
    significand = np.where(exponent > 0, mantissa + 8, mantissa)
    values: Floats = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - 10)
    return values


_E4M3 = _e4m3()


def _nearest(numerator: Floats, denominator: Floats, values: Floats) -> NDArray[np.intp]:
    """Where numerator / denominator lies in increasing values: the nearest, half to even."""
    midpoints = (values[1:] + values[:-1]) / 2
    bounds = midpoints * denominator[..., None]
    odd = np.arange(len(midpoints)) % 2 == 1  # a tie goes up from an odd code
    numerator = numerator[..., None]
    beyond = (numerator > bounds) | (odd & (numerator == bounds))
    found: NDArray[np.intp] = beyond.sum(-1)
    return found


def _scales(numerator_B: Floats, denominator_B: Floats) -> tuple[NDArray[np.intp], Floats]:
    """The new byte of each byte of a block scale, [B, 127], and each old scale * numerator."""
    wanted = _E4M3 * numerator_B[:, None]
    least = np.arange(127) > 0  # 0 stays 0: it is what some write for zeros
    bounds = np.broadcast_to(denominator_B[:, None], wanted.shape)
    return np.maximum(_nearest(wanted, bounds, _E4M3), least), wanted


def exact_scales(
    numerator_B: NDArray[np.float32], denominator_B: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Whether E4M3 holds each of its numbers, by its byte, times the ratio: bool [B, 127]."""
    denominator = denominator_B.astype(np.float64)
    byte, wanted = _scales(numerator_B.astype(np.float64), denominator)
    exact: NDArray[np.bool_] = _E4M3[byte] * denominator[:, None] == wanted
    return exact


def rescale(
    parts: Mapping[str, Bytes],
    numerator_B: NDArray[np.float32],
    denominator_B: NDArray[np.float32],
) -> int:
    """Bring B matrices under their new global scales, in place.

    Args:
        parts: qweight uint8 [B, N, K/2], and the bytes of block_scale [B, N, K/16], which are
            numbers without a sign.
        numerator_B: float32, above 0.
        denominator_B: float32, at least the numerator.

    Returns:
        How many blocks do not stand for the same weights as before.
    """
    denominator = denominator_B.astype(np.float64)
    byte_BS, wanted_BS = _scales(numerator_B.astype(np.float64), denominator)
    held_BS = _E4M3[byte_BS] * denominator[:, None]
    exact_BS = held_BS == wanted_BS
    # What each code of a block becomes, [B, 127, 8], and whether it is exact.
    weights = wanted_BS[..., None] * _E2M1
    held = np.broadcast_to(held_BS[..., None], weights.shape)
    codes = _nearest(weights, held, _E2M1).astype(np.uint8)
    codes_exact = _E2M1[codes] * held == weights
    moved_BS = (codes != np.arange(8)).any(-1)
    moved_BS[:, 0] = False  # whatever the codes, the weights are 0

    qweight, scale = parts["qweight"], parts["block_scale"]
    blocks = qweight.reshape(*scale.shape, _BYTES)
    if not np.shares_memory(blocks, qweight):
        raise ValueError("qweight must be contiguous in its last dimension")
    b = np.arange(len(scale))[:, None, None]
    words = np.ascontiguousarray(blocks).view(np.uint64)[..., 0]
    live = (words & np.uint64(_MAGNITUDES)) != 0
    inexact = live & ~exact_BS[b, scale]
    moved = live & moved_BS[b, scale]
    count = int(inexact.sum())
    if moved.any():
        old = blocks[moved]
        of_block, of_scale = np.nonzero(moved)[0], scale[moved].astype(np.intp)
        index = (of_block[:, None], of_scale[:, None])
        low, high = old & 7, old >> 4 & 7
        blocks[moved] = old & 0x88 | codes[(*index, low)] | codes[(*index, high)] << 4
        whole = (codes_exact[(*index, low)] & codes_exact[(*index, high)]).all(-1)
        count -= int(whole.sum())
    np.copyto(scale, np.where(live, byte_BS[b, scale].astype(np.uint8), scale))
    return count
