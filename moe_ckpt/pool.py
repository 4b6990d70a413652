"""Threads with a worker each, and what may go wrong around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import torch

from .errors import EnvironmentFaultError, MoeCkptError, UsageError, show
from .headers import Shard
from .quantizer import Worker
from .reader import SourceReader
from .schedule import Budget

__all__ = ["Pool", "environment_faults", "pick_device", "pool_over"]

T = TypeVar("T")


class Pool:
    """Threads with a `Worker` each; tasks are called with a free worker."""

    def __init__(self, size: int, make_worker: Callable[[], Worker]) -> None:
        self._threads = ThreadPoolExecutor(size)
        self._free: SimpleQueue[Worker] = SimpleQueue()
        self.workers = [make_worker() for _ in range(size)]
        for worker in self.workers:
            self._free.put(worker)

    def __enter__(self) -> Pool:
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


@contextmanager
def pool_over(shards: Iterable[Shard], device: torch.device, budget: Budget) -> Iterator[Pool]:
    """Threads that read these shards; they must be at the end what they were when planned with."""
    reader = SourceReader(shards)
    try:
        make_worker = partial(Worker, reader, device, budget)
        with _one_torch_thread(), Pool(budget.workers, make_worker) as pool:
            yield pool
        reader.check_unchanged()
    finally:
        reader.close()


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
def environment_faults() -> Iterator[None]:
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
