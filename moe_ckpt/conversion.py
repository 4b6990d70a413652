"""Carry out a plan: for each shard read, find amax, quantize, write; configuration last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from .errors import EnvironmentFaultError, MoeCkptError, UsageError, show
from .formats import find_format
from .plan import Job, OutShard, Plan
from .planner import DEFAULT_FORMAT, DEFAULT_SHARD_SIZE, make_plan
from .quantizer import Worker
from .reader import SourceReader
from .schedule import CPU, CUDA, Budget, batches
from .writer import OutputFolder, ShardWriter, check_out_dir

__all__ = ["Result", "convert", "execute"]

T = TypeVar("T")

# Told after each piece of work: bytes of weights read, and the shard if it was just finished.
Progress = Callable[[int, OutShard | None], None]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished conversion."""

    plan: Plan
    out_dir: Path
    device: str
    seconds: float


def convert(
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    stats: Iterable[str | os.PathLike[str]] = (),
    format: str = DEFAULT_FORMAT,
    quantize: str = "experts",
    experts: str = "auto",
    layout: str | None = None,
    gate_up_order: str | None = None,
    device: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    missing_stats: str = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Convert a checkpoint folder.

    Args:
        in_dir: see `make_plan`.
        stats: see `make_plan`.
        format: see `make_plan`.
        quantize: see `make_plan`.
        experts: see `make_plan`.
        layout: see `make_plan`.
        gate_up_order: see `make_plan`.
        max_shard_size: see `make_plan`.
        missing_stats: see `make_plan`.
        out_dir: a new or empty folder.
        device: "auto", "cpu", "cuda" or "cuda:N"; it changes no output byte.
        overwrite: replace an earlier conversion in ``out_dir``.
        progress: called with the bytes read, and with a shard when it is finished.

    Raises:
        UsageError, InputError, OutputRefusedError: before anything is written.
        CheckpointError: a weight is NaN or infinite; the output is removed.
        EnvironmentFaultError: disk, memory or GPU failed; the output is removed.
    """
    chosen = pick_device(device)
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    plan = make_plan(
        in_dir,
        stats=stats,
        format=format,
        quantize=quantize,
        experts=experts,
        layout=layout,
        gate_up_order=gate_up_order,
        max_shard_size=max_shard_size,
        missing_stats=missing_stats,
    )
    return execute(plan, out_dir, device=chosen, overwrite=overwrite, progress=progress)


def execute(
    plan: Plan,
    out_dir: str | os.PathLike[str],
    *,
    device: torch.device,
    budget: Budget | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan. On any error or interrupt, everything written is removed."""
    started = time.monotonic()
    budget = budget or (CUDA if device.type == "cuda" else CPU)
    report = progress or (lambda *_: None)
    with _environment_faults():
        folder = OutputFolder(plan, Path(out_dir), overwrite=overwrite)
        reader = SourceReader(plan.source_shards)
        try:
            with _one_torch_thread():
                make_worker = partial(Worker, reader, find_format(plan.format), device, budget)
                with _Pool(budget.workers, make_worker) as pool:
                    for shard in plan.shards:
                        _write_shard(folder, shard, pool, budget, report)
            reader.check_unchanged()
            reader.close()
            folder.finish(plan)
        except BaseException:
            reader.close()
            folder.discard()
            raise
    return Result(plan, Path(out_dir), str(device), time.monotonic() - started)


def pick_device(name: str) -> torch.device:
    """The torch device for a name; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {show(name)!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFaultError(
            f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


class _Pool:
    """Threads with a `Worker` each; tasks are called with a free worker."""

    def __init__(self, size: int, make_worker: Callable[[], Worker]) -> None:
        self._threads = ThreadPoolExecutor(size)
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(size):
            self._free.put(make_worker())

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterable[Callable[[Worker], T]], done: Callable[[T], object]) -> None:
        """Run all tasks and pass on what they return; the first error cancels the rest."""
        futures = {self._threads.submit(self._call, task) for task in tasks}
        try:
            while futures:
                finished, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
        except BaseException:
            _cancel(futures)
            raise

    def _call(self, task: Callable[[Worker], T]) -> T:
        worker = self._free.get()
        try:
            return task(worker)
        finally:
            self._free.put(worker)


def _cancel(futures: set[Future[T]]) -> None:
    for future in futures:
        future.cancel()
    wait(futures)


def _write_shard(
    folder: OutputFolder, shard: OutShard, pool: _Pool, budget: Budget, report: Progress
) -> None:
    out = folder.open_shard(shard)
    try:
        tasks = _tasks(shard, _shared_amax(shard, pool, budget), budget, out)
        pool.run(tasks, lambda nbytes: report(nbytes, None))
    except BaseException:
        out.abandon()
        raise
    out.finish()
    report(0, shard)


def _shared_amax(shard: OutShard, pool: _Pool, budget: Budget) -> dict[Job, float]:
    """One amax for all slabs of each job that stacks them: it is needed before the first."""
    found = {}
    for job in shard.jobs:
        if job.is_stacked:
            amax: list[float] = []
            tasks = (partial(Worker.amax, batch=batch) for batch in batches(job, budget))
            pool.run(tasks, amax.append)
            found[job] = max(amax)
    return found


def _tasks(
    shard: OutShard, shared_amax: Mapping[Job, float], budget: Budget, out: ShardWriter
) -> Iterator[Callable[[Worker], int]]:
    for item in shard.copies:
        yield partial(Worker.copy, item=item, out=out)
    for job in shard.jobs:
        amax = shared_amax.get(job) if job.is_stacked else None
        for batch in batches(job, budget):
            yield partial(Worker.quantize, batch=batch, out=out, amax=amax)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Our threads are the parallelism: torch's own would contend with them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _environment_faults() -> Iterator[None]:
    """Turn failures of the machine into `EnvironmentFaultError`."""
    try:
        yield
    except MoeCkptError:
        raise
    except torch.OutOfMemoryError as error:
        raise EnvironmentFaultError(
            f"GPU memory ran out ({show(error)}); free some, or use --device cpu"
        ) from error
    except MemoryError as error:
        raise EnvironmentFaultError("memory ran out; free some and run again") from error
    except OSError as error:
        name = f"{show(error.filename)}: " if error.filename else ""
        raise EnvironmentFaultError(
            f"{name}{error.strerror or show(error)}; nothing usable was left in the output folder, "
            "run again once this is mended"
        ) from error
    except RuntimeError as error:
        if "CUDA" not in str(error):
            raise
        raise EnvironmentFaultError(
            f"the GPU failed ({show(error)}); run again, or use --device cpu"
        ) from error
