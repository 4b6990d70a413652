"""Compare two quantized checkpoints tensor by tensor; exit 1 if they differ.

    python bench/compare.py OURS THEIRS

THEIRS may be another tool's export: names, dtypes, shapes and every byte are compared.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from safetensors import deserialize


def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in deserialize(path.read_bytes())
    }


def main(ours: Path, theirs: Path) -> int:
    mine, other = read(ours), read(theirs)
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
    print(f"{'tensor':16} {'dtype':8} {'tensors':>8} {'bytes':>10}   same as {theirs}")
    for (kind, dtype), (count, nbytes, same) in sorted(rows.items()):
        verdict = "every byte" if same == count else f"NO: {count - same} differ"
        print(f"{kind:16} {dtype:8} {count:8,} {nbytes:10,}   {verdict}")
    return 0 if mine == other else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
