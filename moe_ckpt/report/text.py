"""Sizes and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..errors import show_some

__all__ = ["left_out_lines", "size", "table"]

_SHOWN = 5


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table with aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()


def left_out_lines(names: Sequence[str]) -> Iterator[str]:
    """Files and folders of the source that are not copied, in one line; none if there are none.

    >>> list(left_out_lines(["original/", "pytorch_model.bin"]))
    ['Left out  original/, pytorch_model.bin']
    """
    if names:
        yield f"Left out  {show_some(names, _SHOWN)}"


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
