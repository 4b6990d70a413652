"""Carry out a plan: for each shard read, find amax, quantize, write; configuration last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from .engines import Backend, backend_for
from .options import Limits, PlanOptions
from .plan import Job, OutShard, Plan
from .planner import make_plan
from .pool import Pool, environment_faults, pool_over
from .quantizer import Worker
from .schedule import Budget, batches, budget_for, gathered_nbytes
from .writer import OutputFolder, ShardWriter, check_out_dir

__all__ = ["Result", "convert", "execute"]

# Told after each piece of work: bytes of weights read, and the shard if it was just finished.
Progress = Callable[[int, OutShard | None], None]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished conversion.

    ``inexact_blocks``: blocks of MXFP4 that NVFP4 could not hold exactly.
    """

    plan: Plan
    out_dir: Path
    device: str
    seconds: float
    inexact_blocks: int = 0


def convert(
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    device: str = "auto",
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Result:
    """Convert a checkpoint folder.

    Args:
        in_dir: a checkpoint folder.
        out_dir: a new or empty folder.
        device: "auto", "cpu", "cuda" or "cuda:N"; it changes no output byte.
        limits: threads and memory; they change none either.
        overwrite: replace an earlier conversion in ``out_dir``.
        progress: called with the bytes read, and with a shard when it is finished.
        options: those of `moe_ckpt.Options`.

    Raises:
        UsageError, InputError, OutputRefusedError: before anything is written.
        CheckpointError: a weight is NaN or infinite, or scales contradict each other; the output
            is removed.
        EnvironmentFaultError: disk, memory or GPU failed; the output is removed.
    """
    backend = backend_for(device)
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    plan = make_plan(in_dir, **options)
    return execute(
        plan, out_dir, backend=backend, limits=limits, overwrite=overwrite, progress=progress
    )


def execute(
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    backend: Backend,
    limits: Limits | None = None,
    budget: Budget | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan. On any error or interrupt, everything written is removed.

    ``budget`` instead of what ``limits`` ask for is for tests.
    """
    started = time.monotonic()
    budget = budget or budget_for(backend, limits or Limits(), gathered_nbytes(plan))
    report = progress or (lambda *_: None)
    with environment_faults():
        folder = OutputFolder(plan, Path(out_dir), overwrite=overwrite)
        try:
            with (
                pool_over(plan.source_shards, backend, budget) as pool,
                ThreadPoolExecutor(1) as finisher,
            ):
                # While the disk takes one shard, the next is made; the callback is this thread's.
                finishing: Future[OutShard] | None = None
                for shard in plan.shards:
                    out = _write_shard(folder, shard, pool, budget, report)
                    try:
                        if finishing:
                            report(0, finishing.result())
                    except BaseException:
                        out.abandon()
                        raise
                    finishing = finisher.submit(out.finish)
                if finishing:
                    report(0, finishing.result())
                inexact = sum(worker.inexact_blocks for worker in pool.workers)
            folder.finish(plan)
        except BaseException:
            folder.discard()
            raise
    return Result(plan, Path(out_dir), backend.name, time.monotonic() - started, inexact)


def _write_shard(
    folder: OutputFolder, shard: OutShard, pool: Pool, budget: Budget, report: Progress
) -> ShardWriter:
    out = folder.open_shard(shard)
    try:
        for constant in shard.constants:
            out.write(constant.offset, memoryview(constant.data))
        tasks = _tasks(shard, _shared_amax(shard, pool, budget), budget, out)
        pool.run(tasks, lambda nbytes: report(nbytes, None))
    except BaseException:
        out.abandon()
        raise
    return out


def _shared_amax(shard: OutShard, pool: Pool, budget: Budget) -> dict[Job, float]:
    """One amax for all slabs of each job that stacks them: it is needed before the first."""
    found = {}
    for job in shard.jobs:
        if job.is_stacked:
            known = [slab.amax for slab in job.slabs]
            amax = [value for value in known if value is not None]
            if len(amax) < len(known) or job.is_recoded:
                amax = []
                tasks = (partial(Worker.amax, batch=batch) for batch in batches(job, budget))
                pool.run(tasks, amax.extend)
            found[job] = max(amax)
    return found


def _tasks(
    shard: OutShard, shared_amax: Mapping[Job, float], budget: Budget, out: ShardWriter
) -> Iterator[Callable[[Worker], int]]:
    for item in shard.copies:
        yield partial(Worker.copy, item=item, out=out)
    for job in shard.jobs:
        shared = shared_amax.get(job) if job.is_stacked else None
        for batch in batches(job, budget):
            yield partial(Worker.convert, batch=batch, out=out, shared=shared)
