"""Carry out a plan: for each shard read, find amax, quantize, write; configuration last."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

from .engines import Backend, backend_for
from .errors import EnvironmentFaultError, VerifyError, show
from .faults import environment_faults
from .limits import Limits
from .output.journal import head_of, read_journal
from .output.out_dir import check_out_dir, missing_nbytes
from .output.writer import OutputFolder, ShardWriter, output_folder
from .plan import Job, OutShard, Plan
from .planning.options import PlanOptions
from .planning.planner import make_plan
from .result import Result
from .source.checkpoint import INDEX, SideFile, open_side_file
from .source.files import open_planned
from .source.headers import Shard
from .texts import index_of
from .work.batches import Budget, batches, budget_for, gathered_nbytes
from .work.pool import Pool, pool_over
from .work.worker import Worker

__all__ = ["convert", "execute", "prepare"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Told after each piece of work: bytes of weights read, and the shard if it was just finished.
Progress = Callable[[int, OutShard | None], None]


def convert(
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    device: str = "auto",
    limits: Limits | None = None,
    overwrite: bool = False,
    trust_journal: bool = False,
    hash_source: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    **options: Unpack[PlanOptions],
) -> Result:
    """Convert a checkpoint folder, or go on with a conversion of it that was interrupted.

    Args:
        in_dir: a checkpoint folder.
        out_dir: a new or empty folder, or one with the same conversion, finished or not.
        device: "auto", "cpu", "cuda" or "cuda:N"; it changes no output byte.
        limits: threads and memory; they change none either.
        overwrite: remove an earlier conversion in ``out_dir`` and start anew.
        trust_journal: of finished shards compare only the size with the journal.
        hash_source: read the whole source first and record the SHA-256 of each shard; when going
            on, these are compared instead of modification times.
        verify: check structure, scales and configuration before the latter is written.
        progress: called with the bytes read, and with a shard when it is finished.
        options: those of `moe_ckpt.Options`.

    Raises:
        UsageError, InputError, OutputRefusedError: before anything is written.
        CheckpointError: a weight is NaN or infinite, or scales contradict each other.
        EnvironmentFaultError: disk, memory or GPU failed. As after any error, finished shards stay
            and the same call goes on.
        VerifyError: something is wrong with what was written; it has no configuration.
    """
    backend = backend_for(device)
    return execute(
        prepare(in_dir, out_dir, overwrite=overwrite, **options),
        out_dir,
        backend=backend,
        limits=limits,
        overwrite=overwrite,
        trust_journal=trust_journal,
        hash_source=hash_source,
        verify=verify,
        progress=progress,
    )


def prepare(
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    **options: Unpack[PlanOptions],
) -> Plan:
    """The plan of a conversion to a folder; that folder is looked at first, and not written to.

    Raises:
        UsageError, InputError, OutputRefusedError: what is asked for cannot be done.
    """
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    return make_plan(in_dir, **options)


def execute(
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    backend: Backend,
    limits: Limits | None = None,
    budget: Budget | None = None,
    overwrite: bool = False,
    trust_journal: bool = False,
    hash_source: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Result:
    """Carry out a plan, or what is left of it. On any error or interrupt, finished shards stay.

    ``budget`` instead of what ``limits`` ask for is for tests. ``say`` is called with lines for
    people.
    """
    started = time.monotonic()
    verified: Mapping[str, int] = {}
    budget = budget or budget_for(backend, limits or Limits(), gathered_nbytes(plan.jobs))
    with environment_faults():
        content = _hashed(plan, budget.workers) if hash_source else None
        with (
            _leaving(plan, Path(out_dir)),
            output_folder(
                plan,
                Path(out_dir),
                head_of(plan, content),
                overwrite=overwrite,
                trust_journal=trust_journal,
                threads=budget.workers,
                say=say,
            ) as folder,
        ):
            if folder.resumed and not folder.is_complete:
                say(f"going on: {len(folder.resumed)} of {len(plan.shards)} shards are finished")
            if not folder.is_complete:
                _write_shards(plan, folder, backend, budget, progress or (lambda *_: None))
                index = index_of(plan)
                texts = {**plan.files, **({INDEX: index} if index else {})}
                if verify:
                    verified = _verify(folder.root, texts, say)
                folder.finish(texts)
    return Result(
        plan,
        Path(out_dir),
        device=backend.name,
        seconds=time.monotonic() - started,
        resumed=len(folder.resumed),
        was_complete=folder.is_complete,
        inexact_blocks=folder.inexact_blocks,
        verified=verified,
    )


@contextmanager
def _leaving(plan: Plan, out_dir: Path) -> Iterator[None]:
    """Say of a disk that is full how much is missing, once what was unfinished is removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        journal = read_journal(out_dir)
        missing = missing_nbytes(plan, out_dir, journal.records if journal else ())
        what = f"{missing:,} bytes are missing" if missing > 0 else "a limit is reached"
        raise EnvironmentFaultError(
            f"{show(error.filename or out_dir)}: {error.strerror}: {what}; free space and run the "
            "same command again"
        ) from error


def _hashed(plan: Plan, threads: int) -> dict[str, str]:
    """The SHA-256 of every shard of the source, and of every file that is copied beside them."""
    files: tuple[Shard | SideFile, ...] = (*plan.source_shards, *plan.side_files)
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(_digest_of, files)
        return {file.name: sha for file, sha in zip(files, digests, strict=True)}


def _digest_of(file: Shard | SideFile) -> str:
    fd = open_planned(file.path, file.name, file.nbytes, file.mtime_ns)
    with open(fd, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _verify(root: Path, texts: Mapping[str, str], say: Callable[[str], None]) -> Mapping[str, int]:
    """Check the shards on disk with the configuration that is still to be written."""
    from .verify import Findings, check_parts
    from .verify.findings import ERROR, by_effect
    from .verify.subject import open_subject

    findings = Findings()
    check_parts(open_subject(root, findings, texts), findings)
    wrong = findings.of_grade(ERROR)
    if wrong:
        raise VerifyError(
            *(f"{found.where}: {found.problem}; {found.effect}" for found in wrong),
            f"{show(root)}: was not given its configuration; if you know better, the same "
            "command with --no-verify does that",
        )
    for effect, (first, *others) in by_effect(findings.found).items():
        more = f" (and {len(others):,} more)" if others else ""
        say(f"moe-ckpt: warning: {first.where}: {first.problem}{more}; {effect}")
    return findings.counts


def _write_shards(
    plan: Plan, folder: OutputFolder, backend: Backend, budget: Budget, report: Progress
) -> None:
    """Make every shard that is not finished; while some are hashed and flushed, others are made."""
    todo = [shard for shard in plan.shards if shard.name not in folder.finished]
    report(plan.read_nbytes - sum(shard.read_nbytes for shard in todo), None)
    # Without instructions for it, SHA-256 takes a core as long as four others quantize.
    most = max(1, budget.workers // 4)
    with pool_over(plan.source_shards, backend, budget) as pool, ThreadPoolExecutor(most) as finish:
        try:
            finishing: deque[Future[OutShard]] = deque()
            for shard in todo:
                before = sum(worker.inexact_blocks for worker in pool.workers)
                out = _write_shard(folder, shard, pool, budget, report)
                try:
                    pool.reader.check_unchanged()
                    _check_side_files(plan)
                    while len(finishing) >= most:
                        report(0, finishing.popleft().result())  # the callback is this thread's
                except BaseException:
                    out.abandon()
                    raise
                inexact = sum(worker.inexact_blocks for worker in pool.workers) - before
                finishing.append(finish.submit(folder.publish_shard, out, inexact))
            while finishing:
                report(0, finishing.popleft().result())
        except BaseException:
            folder.stop.set()
            raise


def _check_side_files(plan: Plan) -> None:
    """Notice at once what would be noticed when they are copied, after all shards."""
    for file in plan.side_files:
        os.close(open_side_file(plan.root, file))


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
            known = [output.amax for output in job.outputs]
            amax = [value for value in known if value is not None]
            if len(amax) < len(known) or job.is_recoded:
                amax = []
                tasks = (
                    partial(Worker.largest, job=job, batch=b) for b in batches(job.place, budget)
                )
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
        for batch in batches(job.place, budget):
            yield partial(Worker.convert, job=job, batch=batch, out=out, shared=shared)
