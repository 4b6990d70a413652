"""Compare two quantized checkpoints tensor by tensor; exit 1 if they differ.

    python -m bench same OURS THEIRS

THEIRS may be another tool's export: names, dtypes, shapes and every byte are compared.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from safetensors import deserialize

__all__ = ["add_arguments", "run"]


def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors of a folder."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in deserialize(path.read_bytes())
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("ours", type=Path, metavar="OURS")
    parser.add_argument("theirs", type=Path, metavar="THEIRS")


def run(args: argparse.Namespace) -> int:
    """Print a line for each kind of tensor; returns the exit code."""
    mine, other = read(args.ours), read(args.theirs)
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name in mine.keys() | other.keys():
        dtype, _, data = mine.get(name) or other[name]
        scales = ("weight_scale", "weight_scale_2", "input_scale", "weight_scale_inv")
        suffix = name.rpartition(".")[2]
        kind = suffix if suffix in scales else "weight" if suffix == "weight" else "other"
        row = rows[kind, dtype]
        row[0] += 1
        row[1] += len(data)
        row[2] += mine.get(name) == other.get(name)
    print(f"{'tensor':16} {'dtype':8} {'tensors':>8} {'bytes':>10}   same as {args.theirs}")
    for (kind, dtype), (count, nbytes, same) in sorted(rows.items()):
        verdict = "every byte" if same == count else f"NO: {count - same} differ"
        print(f"{kind:16} {dtype:8} {count:8,} {nbytes:10,}   {verdict}")
    return 0 if mine == other else 1
