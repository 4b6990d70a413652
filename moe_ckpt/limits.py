"""What a conversion may use of a machine; nothing of it changes a byte."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UsageError, show

__all__ = ["Limits", "parse_size"]

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
_UNITS |= {"TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1, "": 1}
_MOST_THREADS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Threads and memory.

    ``workers``: threads, at most 256; None for one per core, up to 16, or 8 with CUDA. ``memory``
    and ``device_memory``: all buffers together, on the host and on the GPU, beside the program
    itself and the plan; bytes, or text such as "256MiB". A matrix that must be gathered before it
    is written may need more.

    Raises:
        UsageError: one is not such a size, or ``workers`` is not from 1 to 256.
    """

    workers: int | None = None
    memory: str | int = "256MiB"
    device_memory: str | int = "2GiB"

    def __post_init__(self) -> None:
        parse_size(self.memory)
        parse_size(self.device_memory)
        if self.workers is not None and not 1 <= self.workers <= _MOST_THREADS:
            raise UsageError(f"--workers {show(self.workers)}: expected 1 to {_MOST_THREADS}")


def parse_size(size: str | int) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``512MiB``.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", str(size).strip().upper())
    nbytes = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if not 1 <= nbytes < 2**63:
        raise UsageError(f"size {show(size)!r} is not a number of bytes such as 5GB or 512MiB")
    return int(nbytes)
