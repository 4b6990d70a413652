"""Compare a checkpoint with the source that it was made from.

What was copied must be there byte for byte; so must what is quantized, if a conversion of ours
made it. Of others, whose bytes may differ for good reasons, every weight must be within the error
bound of its format. Either finds swapped, shifted and transposed matrices as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from ...engines import Backend
from ...faults import environment_faults
from ...layouts import Given, detect
from ...layouts.opening import open_released
from ...limits import Limits
from ...source.headers import Shard
from ...source.weights import weights_of
from ...work.batches import Budget, budget_for, gathered_nbytes
from ...work.pool import Pool
from ...work.reader import SourceReader
from ...work.worker import Worker
from ..findings import Findings
from ..subject import Subject
from .beside import check_config_json, check_side_files, name_left_out
from .comparer import Compared, Comparer
from .differences import report
from .lookup import Lookup
from .pairs import CopyPair, MatrixPair, pair_up

__all__ = ["against_source", "spread_over"]

T = TypeVar("T")


def against_source(
    subject: Subject,
    source_dir: str | os.PathLike[str],
    findings: Findings,
    sample: int | None,
    backend: Backend,
    limits: Limits,
    *,
    budget: Budget | None = None,
) -> None:
    """Add what differs from the source.

    Args:
        subject: the checkpoint.
        source_dir: the folder that it was made from.
        findings: to be added to.
        sample: how many slabs of matrices, and how many copied tensors, are read; None for all.
            A slab is a matrix, or those that share a scale, such as gate and up of an expert.
        backend: where to compute; it changes no finding.
        limits: threads and memory.
        budget: instead of what ``limits`` ask for; it is for tests.

    Raises:
        InputError: the source cannot be read.
        EnvironmentFaultError: disk, memory or GPU failed.
    """
    source = open_released(source_dir).source
    weights = weights_of(source)
    detection = detect(weights.tensors, source.config, _given(subject))
    with environment_faults():
        check_config_json(subject, source, findings)
        check_side_files(subject, source, findings)
        name_left_out(subject, source, findings)
        lookup = Lookup(subject)
        pairs = pair_up(subject, weights, detection, lookup, findings)
        chosen: list[CopyPair | MatrixPair] = list(spread_over(pairs.copies, sample))
        chosen += spread_over(pairs.matrices, sample)
        results: list[Compared | None] = [None] * len(chosen)

        def keep(done: tuple[int, Compared]) -> None:
            results[done[0]] = done[1]

        gathered = gathered_nbytes(pair.job for pair in pairs.matrices if pair.job)
        budget = budget or budget_for(backend, limits, gathered)
        with _readers(source.shards.values(), subject.source.shards.values()) as (here, there):
            comparers = {
                Worker(here, backend.make(), budget): Comparer(
                    here, there, backend.make(), budget, lookup, is_ours=subject.is_ours
                )
                for _ in range(budget.workers)
            }
            with backend.around(), Pool(comparers, here) as pool:
                pool.run((partial(_compare, comparers, n, p) for n, p in enumerate(chosen)), keep)
    report(subject, lookup, chosen, results, findings, is_all=sample is None)


def _given(subject: Subject) -> Given:
    """What a conversion of ours was told of the source's layout."""
    options = subject.journal.head.origin["options"] if subject.journal else {}
    return Given(options.get("--layout") or None, options.get("--gate-up-order") or None)


def spread_over(items: Sequence[T], count: int | None) -> list[T]:
    """So many items, evenly spread, the first and the last among them; None for all.

    >>> spread_over("abcdefg", 3), spread_over("abc", 1), spread_over("ab", 64)
    (['a', 'd', 'g'], ['a', 'c'], ['a', 'b'])
    """
    if count is None or count >= len(items):
        return list(items)
    steps = max(count, 2) - 1
    return [items[step * (len(items) - 1) // steps] for step in range(steps + 1)]


def _compare(
    comparers: Mapping[Worker, Comparer], number: int, pair: CopyPair | MatrixPair, worker: Worker
) -> tuple[int, Compared]:
    comparer = comparers[worker]
    if isinstance(pair, CopyPair):
        return number, comparer.copied(worker, pair)
    return number, comparer.converted(worker, pair)


@contextmanager
def _readers(
    ours: Iterable[Shard], theirs: Iterable[Shard]
) -> Iterator[tuple[SourceReader, SourceReader]]:
    """Readers of both checkpoints, which must be at the end what they were when opened."""
    readers = SourceReader(ours), SourceReader(theirs)
    readers[1].stop = readers[0].stop
    try:
        yield readers
        for reader in readers:
            reader.check_unchanged()
    finally:
        for reader in readers:
            reader.close()
