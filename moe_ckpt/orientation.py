"""From weights as the source stores them to matrices [out, in]."""

from __future__ import annotations

import torch

from .formats.scratch import Scratch
from .plan import Job

__all__ = ["in_order", "matrices_of"]


def matrices_of(job: Job, stored: torch.Tensor) -> torch.Tensor:
    """Stored rows [B, rows, columns] as a view [B, P, N, K]: gate and up apart if they alternate.

    P is 2 for those, else 1.
    """
    matrices = stored.transpose(1, 2) if job.is_transposed else stored
    if not job.is_interleaved:
        return matrices.unsqueeze(1)
    B, N, K = matrices.shape
    b, n, k = matrices.stride()
    return matrices.as_strided((B, 2, N // 2, K), (b, n, 2 * n, k))


def in_order(chunk_BNK: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The chunk with its rows one after another, in scratch memory."""
    shape = tuple(chunk_BNK.shape)
    rows = scratch.empty("rows", shape, chunk_BNK.dtype)
    if chunk_BNK.stride(2) == 1:
        return rows.copy_(chunk_BNK)
    # A transposed read strides over whole stored rows, which evict each other from the cache:
    # 20 times slower than to bring the columns together first.
    B, N, K = shape
    columns_BKN = scratch.empty("columns", (B, K, N), chunk_BNK.dtype)
    columns_BKN.copy_(chunk_BNK.transpose(1, 2))
    if B == 1:
        rows[0].copy_(columns_BKN[0].t())  # two dimensions have a kernel of their own
    else:
        rows.copy_(columns_BKN.transpose(1, 2))
    return rows
