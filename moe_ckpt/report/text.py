"""Numbers, sizes and tables for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["count_of", "counted", "size", "table"]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table with aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()


def size(nbytes: float) -> str:
    """Bytes for people, decimal as file sizes are.

    >>> size(999), size(1_500_000), size(2e12)
    ('999 B', '1.5 MB', '2.0 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "shard"), count_of(2000, "tensor")
    ('1 shard', '2,000 tensors')
    """
    plural = "matrices" if noun == "matrix" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def counted(numbers: Mapping[str, int]) -> Iterator[str]:
    """What there is some of, in words: nouns in the plural -> how many.

    >>> list(counted({"shards": 1, "matrices in nvfp4": 1, "copied tensors compared": 2000}))
    ['1 shard', '1 matrix in nvfp4', '2,000 copied tensors compared']
    """
    for noun, number in numbers.items():
        one = re.sub(r"s(?= |$)", "", noun.replace("matrices", "matrix"), count=1)
        if number:
            yield f"{number:,} {one if number == 1 else noun}"
