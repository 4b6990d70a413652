"""A conversion on CUDA beside what bounds it, and its kernels alone.

For a machine with a GPU and nothing else: it makes its own input in WORKDIR, which is best in
memory (/dev/shm), and stops starting new measurements after ``--minutes``. Run in a fresh process
each, in turns: the first conversion of a process pays for the start of CUDA and for compilers, the
following ones do not. Rates are bytes of input a second.

The bound is the lesser of reading the input with all threads and of PCIe to the device.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from . import processes
from .checkpoints import Model, add_sizes, of_size, parse_size
from .limits import cuda_figures, file_figures
from .machine import facts, idleness, room_nbytes
from .make import make_apart
from .report import figures_text
from .tools import MOE_CKPT, Tool

__all__ = ["add_arguments", "run"]

FORMATS = "nvfp4,mxfp4,fp8-channel,fp8-block,fp8-tensor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--formats", default=FORMATS, metavar="NAMES")
    parser.add_argument("--forms", default="fused,split", metavar="NAMES")
    parser.add_argument("--size", type=parse_size, default="12GB", help="of the input")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--times", type=int, default=3, help="conversions in a process")
    parser.add_argument("--minutes", type=float, default=7, metavar="M")
    add_sizes(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; returns the document and its text."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    document: dict[str, Any] = {"bench": "gpu", "machine": facts(), "runs": [], "rounds": []}
    limits = cuda_figures(10)
    if not limits:
        sys.exit("torch finds no CUDA device")
    threads = len(os.sched_getaffinity(0))
    limits += file_figures(args.workdir, 4 * 10**9, threads, 3)
    rates = {figure["what"]: figure["value"] for figure in limits}
    read = rates["read, 1 thread" if threads == 1 else f"read, {threads} threads"]
    bound = min(read, rates["PCIe to the device"])
    document["figures"] = limits
    formats = args.formats.split(",")
    document["figures"] += _kernels(formats, args, rates["device memory, copy, read and written"])
    for form in args.forms.split(","):
        if time.monotonic() > deadline:
            _say(f"{form}: no time left")
            continue
        _convert(form, formats, args, deadline, document)
    document["figures"] += _rates(document["runs"], bound)
    return document, figures_text(document)


def _kernels(
    formats: list[str], args: argparse.Namespace, device_rate: float
) -> Iterator[dict[str, Any]]:
    """amax and quantize of the gate and up of a layer that is on the device."""
    for name in formats:
        shape = (args.experts, 2 * args.intermediate, args.hidden)
        _, found = processes.call("cuda:kernel", name, *shape, 20)
        rate = found["nbytes"] / found["seconds"] / 1e9
        _say(f"kernels, {name}: {rate:.0f} GB/s")
        yield {
            "what": f"kernels, {name}: bytes they must move",
            "value": rate,
            "unit": "GB/s",
            "remark": f"{rate / device_rate:.2f} of the device's memory; "
            f"{found['input_nbytes'] / found['seconds'] / 1e9:.0f} GB/s of weights",
        }


def _convert(
    form: str,
    formats: list[str],
    args: argparse.Namespace,
    deadline: float,
    document: dict[str, Any],
) -> None:
    model = of_size(
        Model(form, 1, args.experts, args.hidden, args.intermediate, args.vocab), args.size
    )
    with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=args.workdir) as name:
        source, out = Path(name) / "source", Path(name) / "out"
        if model.nbytes * 8 // 5 > room_nbytes(Path(name)):
            sys.exit(
                f"{name}: has no room for {model.nbytes / 1e9:.1f} GB; choose a smaller --size"
            )
        make_apart(source, model, args.shard_size)
        for number in range(args.rounds):
            document["rounds"].append({"form": form, "round": number, **idleness()})
            for number_format in formats:
                if time.monotonic() > deadline:
                    _say(f"{form}, {number_format}: no time left in round {number}")
                    continue
                run = _one(source, out, number_format, args.times)
                run |= {"form": form, "format": number_format, "round": number}
                document["runs"].append(run | {"nbytes": model.nbytes})
                spent = ", ".join(f"{seconds:.2f}" for seconds in run["seconds"])
                _say(f"{form}, {number_format}: {spent} s for {model.nbytes / 1e9:.1f} GB")


def _one(source: Path, out: Path, number_format: str, times: int) -> dict[str, Any]:
    tool = Tool(MOE_CKPT, number_format, sys.executable, {"device": "cuda"})
    stats = tool.stats_file(out)
    options = {"stats": [stats], "missing_stats": "constant"} if stats else {}
    options |= {"device": "cuda", "format": number_format}
    measured, found = processes.call("cuda:conversions", source, out, times, options)
    return found | {"cpu_seconds": measured.cpu_seconds, "peak_nbytes": measured.peak_nbytes}


def _rates(runs: list[dict[str, Any]], bound: float) -> Iterator[dict[str, Any]]:
    cases = dict.fromkeys((run["form"], run["format"]) for run in runs)
    for form, name in cases:
        mine = [run for run in runs if (run["form"], run["format"]) == (form, name)]
        nbytes = mine[0]["nbytes"]
        warm = [seconds for run in mine for seconds in run["seconds"][1:]]
        first = [run["seconds"][0] for run in mine]
        what = f"{form} {name}, on CUDA"
        if warm:
            rate = nbytes / min(warm) / 1e9
            yield {
                "what": what,
                "value": rate,
                "unit": "GB/s",
                "remark": f"{rate / bound:.2f} of the bound; median "
                f"{nbytes / median(warm) / 1e9:.1f}",
            }
        yield {
            "what": f"{what}: first in its process",
            "value": min(first),
            "unit": "s",
            "remark": f"{nbytes / 1e9:.1f} GB; median {median(first):.2f}",
        }
        yield {
            "what": f"{what}: device memory",
            "value": max(run["device_nbytes"] for run in mine) / 2**20,
            "unit": "MiB",
        }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
