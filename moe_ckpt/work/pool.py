"""Threads with a worker each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from ..engines import Backend
from ..source.headers import Shard
from .batches import Budget
from .reader import SourceReader
from .worker import Worker

__all__ = ["Pool", "pool_over"]

T = TypeVar("T")


class Pool:
    """Threads with a `Worker` each; tasks are called with a free worker.

    ``reader``: what the workers read with.
    """

    def __init__(self, workers: Iterable[Worker], reader: SourceReader) -> None:
        self.workers = tuple(workers)
        self.reader = reader
        self._threads = ThreadPoolExecutor(len(self.workers))
        self._free: SimpleQueue[Worker] = SimpleQueue()
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
            self.reader.stop.set()
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
def pool_over(shards: Iterable[Shard], backend: Backend, budget: Budget) -> Iterator[Pool]:
    """Threads that read these shards; they must be at the end what they were when planned with."""
    reader = SourceReader(shards)
    try:
        workers = [Worker(reader, backend.make(), budget) for _ in range(budget.workers)]
        with backend.around(), Pool(workers, reader) as pool:
            yield pool
        reader.check_unchanged()
    finally:
        reader.close()
