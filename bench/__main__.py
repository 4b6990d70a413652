"""Measure moe-ckpt beside what the machine and other tools can do."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

COMMANDS = {
    "compare": "moe-ckpt beside cp, llm-compressor and slime's script",
    "limits": "what this machine can do: read, write, copy, start a process; PCIe and GPU memory",
    "gpu": "a conversion on CUDA, and its kernels alone, beside those limits",
    "plan": "the plan of a checkpoint of 276,480 output tensors",
    "stages": "where the CPU time of a conversion goes",
    "make": "a large checkpoint of random weights",
    "same": "two quantized checkpoints, tensor by tensor",
}


def main() -> None:
    """Parse, measure, print; figures go to stdout, progress to stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        module = import_module(f".{name}", "bench") if name in sys.argv[1:2] else None
        command = commands.add_parser(
            name,
            help=text,
            description=module.__doc__ if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.add_arguments(command)
            if name not in ("make", "same"):
                command.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
            command.set_defaults(run=module.run)
    args = parser.parse_args()
    # What was written into memory must go, however this ends.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    run, target = vars(args).pop("run"), vars(args).pop("json", None)
    result = run(args)
    if isinstance(result, tuple):
        _print(*result, target)
        result = 0
    sys.exit(result)


def _print(document: dict[str, Any], text: str, target: Path | None) -> None:
    print(text)
    if target:
        target.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
