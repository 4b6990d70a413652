"""From weights as the source stores them to matrices [out, in]."""

from __future__ import annotations

from typing import Any

from ..plan import Job

__all__ = ["matrices_of"]


def matrices_of(job: Job, stored: Any) -> tuple[Any, ...]:
    """Views [B, N, K] of stored rows [B, rows, columns]: gate and up apart if they alternate."""
    matrices = stored.swapaxes(1, 2) if job.is_transposed else stored
    return (matrices[:, 0::2], matrices[:, 1::2]) if job.is_interleaved else (matrices,)
