"""Write docs/loads.md from what loaders did and from what is known of them."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from moe_ckpt.loaders.judge import LOADERS
from moe_ckpt.loaders.loader import Limit, Plain

PAGE = Path(__file__).with_name("loads.md")
VERDICTS = Path(__file__).parents[1] / "fixtures" / "loads" / "verdicts.csv"

HEAD = """\
# What loads where

<!-- Written by docs/generate_loads.py from fixtures/loads and moe_ckpt/loaders. Do not edit. -->

"Loads in" of a plan, and what `verify` says of each runtime, follow from all that is written: the
model type, how the dialect spells each format, which linear layers are quantized and which are not,
and what is known of each runtime's loader. A runtime that loads a result and computes something
else is not named.

## Claimed and tried

Tiny models were converted, and loaded by the runtimes' own code on a CPU: every element of every
parameter has to be written once, with the bytes of the files. Each model was tried in up to 35
ways: every format in every dialect, experts only and `--quantize linear`; some in several formats,
too. The columns say in how many of them the runtime loads the result. **What a plan claims is the
same in every case**, both ways: a test makes each plan again and compares. What could not be built
on a CPU is left out.
"""

LIMITS = """\
## What stops a loader, or goes wrong in it

Beside the models and formats that a runtime does not have at all:
"""

TAIL = """\
What is said of TensorRT-LLM was read in its source and not tried.
"""


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *_counts(), LIMITS, *_limits(), TAIL])


def _counts() -> Iterator[str]:
    with VERDICTS.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    runtimes = [name for name in rows[0] if " " in name]
    yes: dict[str, Counter[str]] = defaultdict(Counter)
    tried: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for runtime in runtimes:
            tried[row["model"]][runtime] += bool(row[runtime])
            yes[row["model"]][runtime] += row[runtime] == "yes"
    yield f"| model type | {' | '.join(runtimes)} |"
    yield f"|---|{'---|' * len(runtimes)}"
    for model in tried:
        cells = [
            f"{yes[model][r]} of {tried[model][r]}" if tried[model][r] else "" for r in runtimes
        ]
        yield f"| {model} | {' | '.join(cells)} |"
    total = [
        f"{sum(c[r] for c in yes.values())} of {sum(c[r] for c in tried.values())}"
        for r in runtimes
    ]
    yield f"| all | {' | '.join(total)} |"
    yield ""


def _limits() -> Iterator[str]:
    for loader in LOADERS:
        if not (loader.plain or loader.limits):
            continue
        yield f"**{loader.name} {loader.version}**\n"
        for row in loader.plain:
            yield f"- {_where(row)}: it builds `{row.modules}` in 16 bits, whatever the list says."
        for limit in dict.fromkeys(loader.limits):
            outcome = " It loads, and computes garbage." if limit.is_garbage else ""
            yield f"- {_where(limit)}: {limit.why}.{outcome}"
        yield ""


def _where(row: Plain | Limit) -> str:
    parts = [", ".join(row.model_types) or "all models"]
    if isinstance(row, Plain) and row.besides:
        parts = [f"all models but {', '.join(row.besides)}"]
    if row.formats or row.methods:
        formats = ", ".join(f"`{name}`" for name in row.formats) or "all formats"
        methods = " and ".join(row.methods)
        parts.append(f"{formats}{f' of {methods}' if methods else ''}")
    if isinstance(row, Limit):
        if row.modules is not None:
            parts.append(f"in `{row.modules}`" if row.modules else "in linear layers")
        if row.kept:
            parts.append(f"where `{row.kept}` stays in 16 bits")
        if row.in_mixes:
            parts.append("beside another format")
    return ", ".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
