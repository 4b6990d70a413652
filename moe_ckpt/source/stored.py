"""Where weights lie in a source, and how they are stored there: values, without bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from ..dtypes import nbytes_of
from ..formats import UNQUANTIZED, Part

__all__ = ["Encoded", "Place", "Read", "Slab", "plain"]


class Read(NamedTuple):
    """A contiguous byte range of a source shard."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """How source weights are stored: as the parts of a number format, in their dtypes.

    The code comes first; weights that are not quantized have no other part, and the format
    `UNQUANTIZED` whatever their dtype. ``inverse``: roles that hold the reciprocal.
    """

    format: str
    parts: tuple[Part, ...]
    inverse: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.format)  # of all parts it would take long, and nearly all are equal

    @property
    def is_plain(self) -> bool:
        """Whether the weights are not quantized."""
        return self.format == UNQUANTIZED

    @property
    def dtype(self) -> str:
        """The dtype that the weights have once they are decoded."""
        return self.parts[0].dtype if self.is_plain else "F32"

    @property
    def has_input_scale(self) -> bool:
        """Whether a static activation scale is stored beside the weights."""
        return any(part.role == "input_scale" for part in self.parts)

    @property
    def row_step(self) -> int:
        """Rows that share an item of some part."""
        return max(part.rows for part in self.parts)


@cache
def plain(dtype: str) -> Encoded:
    """Weights that are stored as they are."""
    return Encoded(UNQUANTIZED, (Part("qweight", dtype, 1),))


class Slab(NamedTuple):
    """Matrices stacked by rows, such as gate and up of an expert.

    ``reads``: for each source tensor in order, the bytes of each of its parts. ``labels``: what to
    call each tensor in a message.
    """

    reads: tuple[tuple[Read, ...], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Slabs of one shape, and how their matrices lie in them.

    ``source_rows`` holds N of each source tensor of a slab, ``rows`` N of each matrix that the
    slab holds, ``columns`` is K of all. ``is_transposed``: the source stores slabs [K, N].
    ``is_interleaved``: rows of two matrices alternate.
    """

    slabs: tuple[Slab, ...]
    source_rows: tuple[int, ...]
    rows: tuple[int, ...]
    columns: int
    encoded: Encoded
    is_transposed: bool = False
    is_interleaved: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the weights when they are decoded."""
        return self.encoded.dtype

    @property
    def slab_rows(self) -> int:
        """Rows of one slab, all matrices together."""
        return sum(self.rows)

    @property
    def slab_nbytes(self) -> int:
        """Bytes of one slab when it is decoded."""
        return nbytes_of(self.dtype, (self.slab_rows, self.columns))

    @property
    def read_nbytes(self) -> int:
        """Source bytes of all slabs."""
        first = self.slabs[0]
        return len(self.slabs) * sum(read.nbytes for reads in first.reads for read in reads)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of a slab as the source stores it."""
        shape = (self.slab_rows, self.columns)
        return shape[::-1] if self.is_transposed else shape

    @property
    def stored_row_nbytes(self) -> int:
        """Bytes of one stored row when it is decoded."""
        return nbytes_of(self.dtype, self.stored_shape[1:])

    def cut(self, start: int, stop: int) -> Place:
        """Slabs ``start`` to ``stop`` alone."""
        return replace(self, slabs=self.slabs[start:stop])
