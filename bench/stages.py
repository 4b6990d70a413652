"""Where the time of a conversion on a CPU goes: CPU seconds of its threads in each stage.

The conversion runs in this process, twice, and the second is measured: imports and compilers are
not in it. What no stage accounts for is Python, numpy and waiting for each other.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoints import FORMS, Model, of_size, parse_size, write
from .machine import facts, idleness
from .report import table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--format", default="nvfp4", metavar="NAME")
    parser.add_argument("--form", default="fused", choices=FORMS)
    parser.add_argument("--size", type=parse_size, default=parse_size("2.4GB"), metavar="SIZE")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; returns the document and its text."""
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]  # as the command does
    import moe_ckpt

    args.workdir.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"bench": "stages", "machine": facts(), "format": args.format}
    with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=args.workdir) as name:
        source, out = Path(name) / "in", Path(name) / "out"
        write(source, of_size(Model(args.form), args.size), 5 * 10**9)
        moe_ckpt.convert(source, out, format=args.format, device="cpu")
        shutil.rmtree(out)
        document["idle"] = idleness()
        spent = _watch()
        started, cpu = time.perf_counter(), time.process_time()
        moe_ckpt.convert(source, out, format=args.format, device="cpu")
        document["seconds"] = time.perf_counter() - started
        document["cpu_seconds"] = time.process_time() - cpu
    document["stages"] = {
        stage: {"cpu_seconds": spent[stage, "cpu"], "calls": spent[stage, "calls"]}
        for stage in dict.fromkeys(stage for stage, _ in spent)
    }
    return document, _text(document)


def _watch() -> Counter[tuple[str, str]]:
    """Count what the stages take from now on."""
    from moe_ckpt import conversion
    from moe_ckpt.engines import backend_for
    from moe_ckpt.output.writer import ShardWriter
    from moe_ckpt.work.reader import SourceReader

    engine = type(backend_for("cpu").make())
    spent: Counter[tuple[str, str]] = Counter()
    stages: list[tuple[str, Any, str]] = [
        ("read", SourceReader, "read"),
        ("forget what was read", SourceReader, "forget"),
        ("decode", engine, "decode"),
        ("find amax", engine, "largest"),
        ("quantize", engine, "quantize"),
        ("write", ShardWriter, "write"),
        ("reserve the file", ShardWriter, "__init__"),
        ("hash and flush", ShardWriter, "finish"),
        ("verify", conversion, "_verify"),
    ]
    for stage, owner, name in stages:
        setattr(owner, name, _counted(stage, getattr(owner, name), spent))
    return spent


def _counted(
    stage: str, method: Callable[..., Any], spent: Counter[tuple[str, str]]
) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        before = time.thread_time()
        try:
            return method(*args, **options)
        finally:
            spent[stage, "cpu"] += time.thread_time() - before
            spent[stage, "calls"] += 1

    return counted


def _text(document: dict[str, Any]) -> str:
    total = document["cpu_seconds"]
    stages = dict(document["stages"])
    rest = total - sum(stage["cpu_seconds"] for stage in stages.values())
    lines = [
        (name, f"{of['cpu_seconds']:.2f}", f"{of['cpu_seconds'] / total:.0%}", f"{of['calls']:,}")
        for name, of in stages.items()
    ]
    lines.append(("the rest", f"{rest:.2f}", f"{rest / total:.0%}", ""))
    cores = document["cpu_seconds"] / document["seconds"]
    lines.append(("all", f"{total:.2f}", f"{cores:.2f} cores for {document['seconds']:.2f} s", ""))
    return table(("stage", "CPU s", "share", "calls"), lines)
