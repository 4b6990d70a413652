"""moe-ckpt beside `cp`, llm-compressor and slime's script, on the same input and interleaved.

Every run is a whole process that reads the input and writes a new folder, removed at once. In a
round each tool has its turn with each size, so that a slow minute of the machine meets all of them.
A run that took longer than ``--slow`` seconds is repeated only ``--slow-rounds`` times.

WORKDIR is best in memory (/dev/shm): then nothing but the programs is measured. With ``--cold`` it
should be on a disk: the input is dropped from the page cache before each run, and the time until
the output is on the disk counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import checkpoints, processes
from .checkpoints import FORMS, Model, of_size, parse_size
from .machine import facts, idleness, room_nbytes
from .make import make_apart
from .processes import Measured
from .report import compare_text
from .summary import marginals, rows
from .tools import CP, MOE_CKPT, Competitors, Tool, tools

__all__ = ["add_arguments", "run"]

FORMATS = "nvfp4,mxfp4,fp8-channel,fp8-block,fp8-tensor"
_VERSIONS = (
    "import json; from importlib.metadata import version as v; "
    "print(json.dumps({n: v(n) for n in ('torch', 'llmcompressor', 'compressed-tensors')}))"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--formats", type=_list, default=FORMATS, metavar="NAMES")
    parser.add_argument("--forms", type=_list, default="fused,split", metavar="NAMES")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--slow", type=float, default=15, metavar="SECONDS")
    parser.add_argument("--slow-rounds", type=int, default=2, metavar="N")
    parser.add_argument("--size", type=parse_size, default="2.4GB", help="of the small input")
    parser.add_argument(
        "--big", type=parse_size, default="8GB", help="of the big one; 0 for none, and no rates"
    )
    parser.add_argument("--device", default="cpu", help="of moe-ckpt")
    parser.add_argument("--cold", action="store_true", help="drop the input from the page cache")
    parser.add_argument(
        "--llm-compressor", type=Path, metavar="PYTHON", help="a Python that has it"
    )
    parser.add_argument(
        "--slime", type=Path, metavar="SCRIPT", help="its tools/convert_hf_to_fp8.py"
    )
    parser.add_argument(
        "--others-big",
        type=_list,
        default="nvfp4",
        metavar="NAMES",
        help="formats in which the other tools get the big input as well, for their rates",
    )
    parser.add_argument(
        "--others-workers",
        type=int,
        default=1,
        metavar="N",
        help="their threads over shards; 1 is what both do if not told, each with torch's threads",
    )
    checkpoints.add_sizes(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; returns the document and its text."""
    unknown = set(args.forms) - set(FORMS)
    if unknown:
        sys.exit(f"unknown form {', '.join(unknown)}; choose from {', '.join(FORMS)}")
    others = Competitors(args.llm_compressor, args.slime, args.others_workers)
    every = tools(args.formats, others, args.device)
    document: dict[str, Any] = {
        "bench": "compare",
        "machine": facts(),
        "llm_compressor": _versions(args.llm_compressor),
        "options": {name: _plain(value) for name, value in vars(args).items() if name != "command"},
        "rounds": [],
        "inputs": [],
        "runs": [],
    }
    args.workdir.mkdir(parents=True, exist_ok=True)
    for form in args.forms:
        with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=args.workdir) as folder:
            _measure_form(args, form, every, Path(folder), document)
    document["rows"] = rows(document)
    document["marginals"] = marginals(document)
    return document, compare_text(document)


def _measure_form(
    args: argparse.Namespace, form: str, every: list[Tool], folder: Path, document: dict[str, Any]
) -> None:
    model = Model(form, 1, args.experts, args.hidden, args.intermediate, args.vocab)
    models = {"small": of_size(model, args.size)}
    if args.big:
        models["big"] = of_size(model, args.big)
    _refuse_if_full(models, args.shard_size * args.others_workers, folder)
    for size, found in models.items():
        make_apart(folder / size, found, args.shard_size)
        document["inputs"].append(
            {"form": form, "size": size, "nbytes": found.nbytes, **asdict(found)}
        )
    done: Counter[tuple[object, ...]] = Counter()
    limit: dict[tuple[object, ...], int] = {}
    for number in range(args.rounds):
        document["rounds"].append({"form": form, "round": number, **idleness()})
        _baselines(form, number, every, document)
        turn = number % len(every)
        for size in models:
            for tool in every[turn:] + every[:turn]:
                case = (tool.name, tool.format, size)
                if size == "big" and not _gets_big(tool, args.others_big):
                    continue
                if done[case] >= limit.get(case, args.rounds):
                    continue
                measured, nbytes = _measure(tool, folder / size, folder / "out", args.cold)
                done[case] += 1
                if measured.error:
                    _say_error(tool, measured.error)
                    limit[case] = 0
                elif measured.seconds > args.slow:
                    limit[case] = args.slow_rounds
                _record(
                    document,
                    measured,
                    form=form,
                    size=size,
                    round=number,
                    output_nbytes=nbytes,
                    tool=tool.name,
                    format=tool.format,
                )


def _measure(tool: Tool, source: Path, out: Path, cold: bool) -> tuple[Measured, int]:
    """One run of a tool, and the bytes that it wrote."""
    if cold:
        _evict(source)
    out.mkdir()
    measured = processes.run(tool.command(source, out))
    if cold:
        measured += processes.run(["sync", "-f", out])
    nbytes = checkpoints.sizes_of(out)
    shutil.rmtree(out)
    return measured, nbytes


def _baselines(form: str, number: int, every: list[Tool], document: dict[str, Any]) -> None:
    """`import torch` with each Python that is used."""
    for executable in {tool.python: None for tool in every if tool.python}:
        measured = processes.python(executable, "import torch")
        _record(
            document,
            measured,
            form=form,
            size="none",
            round=number,
            output_nbytes=0,
            tool="import torch",
            format=_owner(executable, every),
        )


def _owner(executable: str, every: list[Tool]) -> str:
    """Which tool's Python it is."""
    return next(tool.name for tool in every if tool.python == executable)


def _record(document: dict[str, Any], measured: Measured, **case: object) -> None:
    taken = {name: value for name, value in asdict(measured).items() if name != "stdout"}
    document["runs"].append(case | taken)
    words = " ".join(str(case[name]) for name in ("form", "size", "tool", "format"))
    print(f"round {case['round']}: {words}: {measured.seconds:.2f} s", file=sys.stderr, flush=True)


def _say_error(tool: Tool, error: str) -> None:
    if tool.name in (CP, MOE_CKPT):
        sys.exit(f"{tool.name} {tool.format} failed: {error}")
    print(f"warning: {tool.name} {tool.format} failed: {error}", file=sys.stderr)


def _gets_big(tool: Tool, formats: list[str]) -> bool:
    return tool.name in (CP, MOE_CKPT) or tool.format in formats


def _refuse_if_full(models: dict[str, Model], at_once_nbytes: int, folder: Path) -> None:
    """Room for the inputs, and a copy, or an output and tools that load shards twice over."""
    sizes = [model.nbytes for model in models.values()]
    output = max(sizes) * 3 // 5 + 2 * min(at_once_nbytes, max(sizes))
    needed = sum(sizes) + max(output, max(sizes))
    room = room_nbytes(folder)
    if needed > room:
        sys.exit(
            f"{folder}: needs {needed / 1e9:.1f} GB, has {room / 1e9:.1f}; choose a smaller --big"
        )


def _evict(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _versions(executable: Path | None) -> str | None:
    return processes.python(executable, _VERSIONS).stdout.strip() if executable else None


def _list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
