"""What is asked of rows of any format on a CPU: largest magnitudes, and another order."""

from __future__ import annotations

from typing import Any

from .elements import as_number, compiled, magnitude, row_of

__all__ = ["largest_of_columns", "largest_of_rows", "transpose"]

_TILE = 32


@compiled
def largest_of_rows(weight: Any, found: Any, shape: Any) -> None:
    """float32 [B, N], not finite where a weight is not."""
    B, N, K = shape
    for b in range(B):
        for n in range(N):
            row = row_of(weight, b, n, K)
            largest = magnitude(row[0])
            for k in range(1, K):
                largest = max(largest, magnitude(row[k]))
            found[b, n] = as_number(largest)


@compiled
def largest_of_columns(weight: Any, largest: Any, shape: Any) -> None:
    """Bits without sign [B, K], of the type of the weights; ``largest`` begins as zeros."""
    B, N, K = shape
    for b in range(B):
        so_far = largest[b]
        for n in range(N):
            row = row_of(weight, b, n, K)
            for k in range(K):
                so_far[k] = max(so_far[k], magnitude(row[k]))


@compiled
def transpose(weight_BKN: Any, out_BNK: Any) -> None:
    """Copy [B, K, N], rows contiguous, to [B, N, K] in tiles that stay in the cache."""
    B, K, N = weight_BKN.shape
    for b in range(B):
        for n in range(0, N, _TILE):
            for k in range(0, K, _TILE):
                for i in range(n, min(n + _TILE, N)):
                    for j in range(k, min(k + _TILE, K)):
                        out_BNK[b, i, j] = weight_BKN[b, j, i]
