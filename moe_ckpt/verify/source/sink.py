"""Compare what a conversion would write with what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ...dtypes import itemsize
from ...source.headers import TensorInfo
from ...source.items import DTYPES, numbers
from ...source.stored import Read
from ...work.reader import SourceReader

__all__ = ["Comparison", "Segment", "Unequal"]

_PIECE_NBYTES = 1 << 20


class Segment(NamedTuple):
    """Bytes that would be written from ``start`` on, and where they should be found.

    ``read`` is a part of ``tensor``, or all of it.
    """

    start: int
    tensor: TensorInfo
    read: Read


@dataclass(frozen=True, slots=True)
class Unequal:
    """A tensor that differs: in how many bytes, and the bytes of the first item that does.

    ``item`` is its number in the tensor.
    """

    tensor: TensorInfo
    count: int
    item: int
    expected: bytes
    found: bytes

    def describe(self) -> str:
        """What differs, for people."""
        place = np.unravel_index(self.item, self.tensor.shape) if self.tensor.shape else ()
        where = f" at {[int(i) for i in place]}" if self.tensor.nbytes > len(self.found) else ""
        found, expected = (self._value(data) for data in (self.found, self.expected))
        first = f"{found}{where} should be {expected}"
        if self.count <= len(self.found):
            return first
        return f"{self.count:,} of its {self.tensor.nbytes:,} bytes differ; the first: {first}"

    def _value(self, data: bytes) -> str:
        dtype = self.tensor.dtype
        if dtype in ("BF16", "F16", "F32", "F8_E4M3"):
            return f"{float(numbers(np.frombuffer(data, DTYPES[dtype]), dtype)[0]):.9g}"
        return f"0x{data[::-1].hex()}"


class Comparison:
    """A `Sink` that reads what is there, and remembers each tensor that differs."""

    def __init__(self, reader: SourceReader, segments: Sequence[Segment]) -> None:
        self._reader = reader
        self._segments = segments
        self.unequal: dict[str, Unequal] = {}

    def write(self, offset: int, data: memoryview) -> None:
        """Compare bytes; those that belong to no segment are not looked at."""
        end = offset + data.nbytes
        for segment in self._segments:
            first = max(offset, segment.start)
            last = min(end, segment.start + segment.read.nbytes)
            for at in range(first, last, _PIECE_NBYTES):
                stop = min(at + _PIECE_NBYTES, last)
                self._compare(segment, at - segment.start, data[at - offset : stop - offset])

    def _compare(self, segment: Segment, at: int, data: memoryview) -> None:
        expected = np.frombuffer(data, np.uint8)
        found = np.empty_like(expected)
        self._reader.read(segment.read, at, found.data)
        if np.array_equal(expected, found):
            return
        wrong = np.flatnonzero(expected != found)
        tensor = segment.tensor
        size = itemsize(tensor.dtype)
        first = int(wrong[0]) // size * size
        here = Unequal(
            tensor,
            len(wrong),
            (segment.read.offset - tensor.offset + at + first) // size,
            expected[first : first + size].tobytes(),
            found[first : first + size].tobytes(),
        )
        before = self.unequal.get(tensor.name)
        if before:
            one = min(before, here, key=lambda unequal: unequal.item)
            here = replace(one, count=before.count + here.count)
        self.unequal[tensor.name] = here
