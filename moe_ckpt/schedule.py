"""How much is in memory at once: the buffers of a worker, and the batches that fit them.

Nothing here changes an output byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Job, Plan, Slab

if TYPE_CHECKING:
    from .engines import Backend

__all__ = ["CPU", "Batch", "Budget", "batches", "budget_for", "peak_nbytes"]

_MIB = 1 << 20
_FLOAT32_TEMPORARIES = 6


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of one worker's buffers.

    ``stage_nbytes``: source bytes read at once. ``chunk_items``: weights quantized by one
    operation; on a CPU they and the temporaries should stay in the cache.
    """

    stage_nbytes: int
    chunk_items: int
    workers: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Slabs ``start`` to ``stop`` of a job."""

    job: Job
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many slabs."""
        return self.stop - self.start

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """The slabs."""
        return self.job.slabs[self.start : self.stop]

    @property
    def nbytes(self) -> int:
        """Source bytes of the batch."""
        return self.job.slab_nbytes * self.count


CPU = Budget(16 * _MIB, 1 << 18, min(8, len(os.sched_getaffinity(0))))
CUDA = Budget(64 * _MIB, 1 << 24, 2)


def budget_for(backend: Backend) -> Budget:
    """The buffers for a backend."""
    return CUDA if backend.is_cuda else CPU


def batches(job: Job, budget: Budget) -> Iterator[Batch]:
    """Cut a job into batches that fit the stage; a slab that does not is a batch by itself."""
    count = max(1, budget.stage_nbytes // max(job.slab_nbytes, 1))
    for start in range(0, len(job.slabs), count):
        yield Batch(job, start, min(start + count, len(job.slabs)))


def peak_nbytes(plan: Plan, budget: Budget) -> int:
    """An upper estimate of the memory that a conversion takes beside the program itself."""
    temporaries = 4 * budget.chunk_items * _FLOAT32_TEMPORARIES
    names = sum(len(shard.tensors) for shard in plan.shards) * 1024
    gathered = max(
        (
            sum(region.slab_nbytes for region in job.regions)
            for shard in plan.shards
            for job in shard.jobs
            if job.is_transposed and not job.is_stacked
        ),
        default=0,
    )
    stage = max(budget.stage_nbytes, gathered)
    return budget.workers * (budget.stage_nbytes + stage + temporaries) + names
