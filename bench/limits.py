"""What this machine can do, against which speed is to be judged.

Files: `pread` in 4 MiB pieces into reused buffers, from the page cache or memory, and `pwrite` of
such pieces into new files, flushed at the end. "Read and write": each piece is read and the share
of it written that a 4-bit or an 8-bit format has, with nothing done between: the floor of a
conversion. Memory: a copy of 256 MiB for each thread, in bytes copied.

Starts: whole processes. The first reads are those of `moe-ckpt convert` of a small fixture, seen
by inotify from outside: of a header, and of weights, which are what it reads of a shard after
opening it for the last time. A thread of ours notes the time, within a millisecond if idle.

Figures are the best of several rounds; remarks have the medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from . import processes
from .checkpoints import parse_size
from .inotify import Watch, first_reads
from .machine import ROOT, facts, idleness, room_nbytes
from .report import figures_text

__all__ = ["add_arguments", "cuda_figures", "file_figures", "run"]

Figure = dict[str, Any]
PIECE_NBYTES = 4 << 20
COPY_NBYTES = 256 << 20
SHARES = {"nvfp4": 9 / 32, "fp8": 1 / 2}
FIXTURE = ROOT / "fixtures" / "qwen3_moe" / "source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--size", type=parse_size, default="2GB", help="of the file")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="beside 1"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; returns the document and its text."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"bench": "limits", "machine": facts()}
    figures = file_figures(args.workdir, args.size, args.threads, args.rounds)
    figures += processes.call("limits:memory_figures", args.threads, args.rounds)[1]
    figures += _starts(args.workdir, args.rounds)
    figures += cuda_figures(args.rounds)
    document |= {"figures": figures, "after": idleness()}
    return document, figures_text(document)


def file_figures(workdir: Path, nbytes: int, threads: int, rounds: int) -> list[Figure]:
    """Reading and writing files in a folder."""
    nbytes -= nbytes % (PIECE_NBYTES * threads)
    if 2 * nbytes > room_nbytes(workdir):
        sys.exit(f"{workdir}: has no room for {2 * nbytes / 1e9:.1f} GB; choose a smaller --size")
    counts = sorted({1, threads})
    with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=workdir) as name:
        source, folder = Path(name) / "source", Path(name) / "out"
        _fill(source, nbytes)
        cases: dict[str, Callable[[], float]] = {}
        for count in counts:
            cases[f"read, {_threads(count)}"] = partial(_move, source, None, nbytes, count, 0.0)
        for count in counts:
            cases[f"write, {_threads(count)}"] = partial(_move, None, folder, nbytes, count, 1.0)
        one = partial(_move, None, folder, nbytes, threads, 1.0, one_file=True)
        cases[f"write to one file, {_threads(threads)}"] = one
        for kind, share in SHARES.items():
            for count in counts:
                words = f"read and write {share:.0%} ({kind}), {_threads(count)}"
                cases[words] = partial(_move, source, folder, nbytes, count, share)
        return _rates(cases, nbytes, rounds)


def memory_figures(threads: int, rounds: int) -> list[Figure]:
    """Copying memory; imports numpy."""
    import numpy as np

    total = COPY_NBYTES * threads
    buffers = [tuple(np.ones(COPY_NBYTES, np.uint8) for _ in "ab") for _ in range(threads)]

    def copy(count: int) -> float:
        def one(number: int) -> None:
            for target, origin in buffers[number::count]:
                np.copyto(target, origin)

        return _at_once(one, count)

    counts = sorted({1, threads})
    cases = {f"copy memory, {_threads(count)}": partial(copy, count) for count in counts}
    return _rates(cases, total, rounds)


def cuda_figures(rounds: int) -> list[Figure]:
    """PCIe and device memory, if torch finds a device."""
    return list(processes.call("cuda:limits", rounds)[1])


def _fill(path: Path, nbytes: int) -> None:
    piece = os.urandom(PIECE_NBYTES)
    with path.open("wb") as file:
        for _ in range(nbytes // PIECE_NBYTES):
            file.write(piece)
        os.fsync(file.fileno())


def _move(
    source: Path | None,
    folder: Path | None,
    nbytes: int,
    threads: int,
    share: float,
    *,
    one_file: bool = False,
) -> float:
    """Seconds in which threads read parts of a file and write a share of it to new files."""
    if folder:
        folder.mkdir()
    part = nbytes // threads
    buffers = [bytearray(os.urandom(1) * PIECE_NBYTES) for _ in range(threads)]

    def one(number: int) -> None:
        view = memoryview(buffers[number])
        first = number * part
        reads = os.open(source, os.O_RDONLY) if source else -1
        flags = os.O_WRONLY | os.O_CREAT
        writes = os.open(folder / str(0 if one_file else number), flags) if folder else -1
        count = int(PIECE_NBYTES * share)
        position = first // PIECE_NBYTES * count if one_file else 0
        for start in range(first, first + part, PIECE_NBYTES):
            if source:
                os.preadv(reads, [view], start)
            if folder:
                os.pwrite(writes, view[:count], position)
                position += count
        if source:
            os.close(reads)
        if folder:
            os.fsync(writes)
            os.close(writes)

    try:
        return _at_once(one, threads)
    finally:
        if folder:
            shutil.rmtree(folder)


def _at_once(task: Callable[[int], None], threads: int) -> float:
    """Seconds from when all threads are ready to when all have done it."""
    ready = threading.Barrier(threads + 1)

    def wait(number: int) -> None:
        ready.wait()
        task(number)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(wait, number) for number in range(threads)]
        ready.wait()
        started = time.perf_counter()
        for future in futures:
            future.result()
        return time.perf_counter() - started


def _rates(cases: dict[str, Callable[[], float]], nbytes: int, rounds: int) -> list[Figure]:
    """Measure cases in turn, several rounds; bytes a second."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(case())
    return [
        {
            "what": name,
            "value": nbytes / min(found) / 1e9,
            "unit": "GB/s",
            "remark": f"median {nbytes / median(found) / 1e9:.2f}",
        }
        for name, found in seconds.items()
    ]


def _starts(workdir: Path, rounds: int) -> list[Figure]:
    """Seconds of processes, and until `moe-ckpt convert` reads."""
    lines = {"python, nothing": "pass"}
    modules = ("numpy", "numba", "torch", "moe_ckpt.planning.planner")
    lines |= {f"import {name}": f"import {name}" for name in modules if find_spec(name)}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=workdir) as name:
        source = shutil.copytree(FIXTURE, Path(name) / "source")
        for _ in range(rounds):
            for what, line in lines.items():
                spent = processes.python(sys.executable, line).seconds
                seconds.setdefault(what, []).append(spent)
            for what, spent in _convert(source, Path(name) / "out"):
                seconds.setdefault(what, []).append(spent)
    return [
        {
            "what": what,
            "value": min(found),
            "unit": "s",
            "remark": f"median {median(found):.2f}",
        }
        for what, found in seconds.items()
    ]


def _convert(source: Path, out: Path) -> Iterator[tuple[str, float]]:
    """Convert a small checkpoint and watch it read."""
    command = [sys.executable, "-m", "moe_ckpt", "convert", source, out, "-q", "--device", "cpu"]
    with Watch(source) as watch:
        started = time.monotonic()
        measured = processes.run(command)
    shutil.rmtree(out, ignore_errors=True)
    if measured.error:
        sys.exit(f"convert failed: {measured.error}")
    header, weights = first_reads(watch)
    yield "moe-ckpt convert: until a header is read", header - started
    yield "moe-ckpt convert: until weights are read", weights - started
    yield "moe-ckpt convert: a small fixture, all", measured.seconds


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
