"""Read many tensors of a checkpoint and look at their elements, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...source.headers import Shard, TensorInfo
from ...source.items import DTYPES, numbers
from ...source.stored import Read
from ...work.reader import SourceReader
from .levels import Level, joined, level_of

__all__ = ["Bad", "Looked", "bad_codes", "integers", "look_at"]

T = TypeVar("T")

_WINDOW_NBYTES = 1 << 22
_GAP_NBYTES = 1 << 12  # less than this is read rather than skipped
_MOST_THREADS = 8


class Bad(NamedTuple):
    """A tensor with elements that are wrong: how many, the first, and where in the tensor it is."""

    tensor: TensorInfo
    number: int
    first: float
    position: tuple[int, ...]


class _Run(NamedTuple):
    """Bytes of a window that are elements of one dtype: whole tensors, or a part of one."""

    start: int
    stop: int
    tensors: list[TensorInfo]
    skipped: int


class _Window(NamedTuple):
    """A range of a shard that is read at once."""

    read: Read
    runs: list[_Run]


class Looked(NamedTuple):
    """What was seen of scales: those that are wrong, and how large the others are.

    ``bad`` has tensors with elements that are not finite, or below 0; ``zeros`` those with some
    that are 0. ``values`` holds each that is one number, ``levels`` those that are several.
    """

    bad: list[Bad]
    zeros: list[Bad]
    values: dict[str, float]
    levels: dict[str, Level]


def look_at(shards: Iterable[Shard], tensors: Iterable[TensorInfo]) -> Looked:
    """Read scales: floats as they are; bytes are powers of two, as E8M0 has them."""
    values: dict[str, float] = {}
    pieces: dict[str, dict[int, Level]] = {}

    def look(run: _Run, raw: NDArray[np.uint8]) -> list[Bad]:
        dtype = run.tensors[0].dtype
        items = raw.view(DTYPES[dtype])
        if len(run.tensors) == len(items):
            found = numbers(items, dtype)
            values.update(zip((info.name for info in run.tensors), found.tolist(), strict=True))
        else:
            for info, of_it in _items_of(run, items):
                if info.nbytes == of_it.itemsize:
                    values[info.name] = float(numbers(of_it, dtype)[0])
                else:
                    pieces.setdefault(info.name, {})[run.skipped] = level_of(of_it, dtype)
        wrong = _wrong_number(items, dtype)
        if not wrong.any():
            return []
        is_zero = numbers(items, dtype) == 0
        return _bad(run, items, wrong & ~is_zero, dtype) + _bad(run, items, is_zero, dtype)

    found = _over(shards, tensors, look)
    return Looked(
        [bad for bad in found if bad.first != 0],
        [bad for bad in found if bad.first == 0],
        values,
        {name: joined(level for _, level in sorted(of.items())) for name, of in pieces.items()},
    )


def bad_codes(shards: Iterable[Shard], tensors: Iterable[TensorInfo]) -> list[Bad]:
    """Weights in E4M3 with codes that are no number, 0x7F and 0xFF."""

    def look(run: _Run, raw: NDArray[np.uint8]) -> list[Bad]:
        return _bad(run, raw, (raw & 0x7F) == 0x7F, "F8_E4M3")

    return _over(shards, tensors, look)


def integers(shards: Iterable[Shard], tensors: Iterable[TensorInfo]) -> dict[str, list[int]]:
    """The elements of small tensors of integers."""
    found: dict[str, list[int]] = {}

    def look(run: _Run, raw: NDArray[np.uint8]) -> list[Bad]:
        position = 0
        for info in run.tensors:
            items = raw[position : position + info.nbytes]
            found[info.name] = items.view(np.int64 if info.dtype == "I64" else np.int32).tolist()
            position += info.nbytes
        return []

    _over(shards, tensors, look)
    return found


def _wrong_number(items: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    wrong: NDArray[np.bool_]
    if dtype == "F8_E4M3":
        wrong = items - np.uint8(1) >= 0x7E  # 0, both NaN and all with a sign
    elif dtype in ("U8", "F8_E8M0"):
        wrong = items == 0xFF
    else:
        found = numbers(items, dtype)
        wrong = ~(np.isfinite(found) & (found > 0))
    return wrong


def _items_of(run: _Run, items: NDArray[Any]) -> Iterator[tuple[TensorInfo, NDArray[Any]]]:
    """The items of each tensor of a run."""
    start = 0
    for info in run.tensors:
        count = prod(info.shape) if len(run.tensors) > 1 else len(items)
        yield info, items[start : start + count]
        start += count


def _bad(run: _Run, items: NDArray[Any], wrong: NDArray[np.bool_], dtype: str) -> list[Bad]:
    """The tensors of a run that have wrong elements."""
    if not wrong.any():
        return []
    found = []
    for (info, of_it), (_, is_wrong) in zip(
        _items_of(run, items), _items_of(run, wrong), strict=True
    ):
        at_all = np.flatnonzero(is_wrong)
        if len(at_all):
            first = int(at_all[0])
            value = float(numbers(of_it[first : first + 1], dtype)[0])
            at = np.unravel_index(run.skipped + first, info.shape)
            found.append(Bad(info, len(at_all), value, tuple(map(int, at))))
    return found


def _over(
    shards: Iterable[Shard],
    tensors: Iterable[TensorInfo],
    look: Callable[[_Run, NDArray[np.uint8]], list[Bad]],
) -> list[Bad]:
    """What is found in all tensors, one `Bad` for each, and one for its zeros."""
    reader = SourceReader(shards)

    def work(window: _Window) -> list[Bad]:
        raw = np.empty(window.read.nbytes, np.uint8)
        reader.read(window.read, 0, raw.data)
        return [bad for run in window.runs for bad in look(run, raw[run.start : run.stop])]

    found: dict[tuple[str, bool], Bad] = {}
    try:
        for some in _in_order(work, _windows(tensors)):
            for bad in some:
                key = bad.tensor.name, bad.first == 0
                known = found.setdefault(key, bad)
                if known is not bad:
                    found[key] = known._replace(number=known.number + bad.number)
        reader.check_unchanged()
    finally:
        reader.close()
    return list(found.values())


def _in_order(work: Callable[[_Window], T], windows: Iterable[_Window]) -> Iterator[T]:
    """Results in the order of the windows, with few of them in memory."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for window in windows:
                waiting.append(pool.submit(work, window))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _windows(tensors: Iterable[TensorInfo]) -> Iterator[_Window]:
    """Ranges that cover the tensors; what lies close together is read at once."""
    pending: list[TensorInfo] = []
    for info in sorted(tensors, key=lambda info: (info.shard, info.offset)):
        if info.nbytes == 0:
            continue
        if pending and not _joins(pending, info):
            yield _window(pending)
            pending = []
        if info.nbytes > _WINDOW_NBYTES:
            yield from _cut(info)
        else:
            pending.append(info)
    if pending:
        yield _window(pending)


def _joins(pending: list[TensorInfo], info: TensorInfo) -> bool:
    first, last = pending[0], pending[-1]
    return (
        info.shard == last.shard
        and info.offset - last.offset - last.nbytes <= _GAP_NBYTES
        and info.offset + info.nbytes - first.offset <= _WINDOW_NBYTES
    )


def _window(tensors: list[TensorInfo]) -> _Window:
    base, last = tensors[0].offset, tensors[-1]
    runs: list[_Run] = []
    for info in tensors:
        start, stop = info.offset - base, info.offset - base + info.nbytes
        before = runs[-1] if runs else None
        if before and before.stop == start and before.tensors[0].dtype == info.dtype:
            before.tensors.append(info)
            runs[-1] = before._replace(stop=stop)
        else:
            runs.append(_Run(start, stop, [info], 0))
    nbytes = last.offset + last.nbytes - base
    return _Window(Read(tensors[0].shard, base, nbytes), runs)


def _cut(info: TensorInfo) -> Iterator[_Window]:
    """A large tensor in pieces."""
    itemsize = np.dtype(DTYPES[info.dtype]).itemsize
    for start in range(0, info.nbytes, _WINDOW_NBYTES):
        nbytes = min(_WINDOW_NBYTES, info.nbytes - start)
        run = _Run(0, nbytes, [info], start // itemsize)
        yield _Window(Read(info.shard, info.offset + start, nbytes), [run])
