"""How much is in memory at once: the buffers of a worker, and the batches that fit them.

Nothing here changes an output byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..limits import Limits, parse_size
from ..plan import Job, Plan
from ..source.stored import Place, Slab

if TYPE_CHECKING:
    from ..engines import Backend

__all__ = ["Batch", "Budget", "batches", "budget_for", "gathered_nbytes", "peak_nbytes", "split"]

_MIB = 1 << 20
_MOST_STAGE_NBYTES = 16 * _MIB
_LEAST_STAGE_NBYTES = _MIB
_MOST_WORKERS, _MOST_CUDA_WORKERS = 16, 8
_BUFFERS = 3  # a worker needs so many times its stage: what it reads, decodes or orders, and writes
_TEMPORARIES = 24  # bytes that torch's codecs need for a weight beside its code


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of one worker's buffers.

    ``stage_nbytes``: source bytes read at once. ``chunk_items``: weights quantized by one
    operation; on a CPU they and the temporaries should stay in the cache.
    """

    stage_nbytes: int
    chunk_items: int
    workers: int

    def halved(self) -> Budget:
        """For a device that has no room for this one."""
        return replace(self, stage_nbytes=self.stage_nbytes // 2, chunk_items=self.chunk_items // 2)


@dataclass(frozen=True, slots=True)
class Batch:
    """Slabs ``start`` to ``stop`` of a place."""

    place: Place
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many slabs."""
        return self.stop - self.start

    @property
    def slabs(self) -> tuple[Slab, ...]:
        """The slabs."""
        return self.place.slabs[self.start : self.stop]

    @property
    def nbytes(self) -> int:
        """Bytes of the batch when it is decoded."""
        return self.place.slab_nbytes * self.count


def budget_for(backend: Backend, limits: Limits, gathered: int = 0) -> Budget:
    """The buffers of each worker; ``gathered`` is what `gathered_nbytes` says of the jobs.

    Fewer workers before smaller buffers: those cost more than they save.
    """
    memory = parse_size(limits.memory)
    most = _MOST_CUDA_WORKERS if backend.is_cuda else _MOST_WORKERS
    workers = limits.workers or min(most, len(os.sched_getaffinity(0)))
    least = _BUFFERS * _LEAST_STAGE_NBYTES + gathered
    workers = max(1, min(workers, memory // least))
    stage = (memory // workers - gathered) // _BUFFERS
    chunk_items = backend.chunk_items
    if backend.is_cuda:
        share = parse_size(limits.device_memory) // workers
        stage = min(stage, share // 4)
        chunk_items = min(chunk_items, share // 2 // _TEMPORARIES)
    stage = max(_LEAST_STAGE_NBYTES // 4, min(stage, _MOST_STAGE_NBYTES))
    chunk_items = min(chunk_items, stage // 4)  # decoded, they are as large as the stage
    return Budget(stage, max(chunk_items, 1 << 16), workers)


def batches(place: Place, budget: Budget) -> Iterator[Batch]:
    """Cut a place into batches that fit the stage; a slab that does not is a batch by itself."""
    return split(Batch(place, 0, len(place.slabs)), budget)


def split(batch: Batch, budget: Budget) -> Iterator[Batch]:
    """Cut a batch for another budget."""
    count = max(1, budget.stage_nbytes // max(batch.place.slab_nbytes, 1))
    for start in range(batch.start, batch.stop, count):
        yield Batch(batch.place, start, min(start + count, batch.stop))


def gathered_nbytes(jobs: Iterable[Job]) -> int:
    """The largest output of a slab that must be complete before any of it is written."""
    return max(
        (sum(region.slab_nbytes for region in job.regions) for job in jobs if job.is_gathered),
        default=0,
    )


def peak_nbytes(plan: Plan, limits: Limits) -> int:
    """An upper estimate of the memory that a conversion takes beside the program itself."""
    names = sum(len(shard.tensors) for shard in plan.shards) * 1024
    return max(parse_size(limits.memory), gathered_nbytes(plan.jobs)) + names
