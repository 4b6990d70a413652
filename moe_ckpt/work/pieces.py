"""How a batch is cut, and where what becomes of each piece is written.

A slab larger than the stage is read in pieces: stored rows ``start`` to ``stop``, which are columns
of the matrix if the source stores it transposed. A piece is quantized in chunks, which are small
enough for the cache. No cut divides a block of a format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine, host_items
from ..formats import Part, QuantFormat, find_format
from ..plan import Job, Region
from ..source.stored import Place
from .batches import Batch, Budget

__all__ = ["Chunk", "PieceWriter", "Sink", "cut", "matrices_of", "write"]


class Sink(Protocol):
    """Where the bytes of tensors go: a `ShardWriter`, or a check of what is there already."""

    def write(self, offset: int, data: memoryview) -> None:
        """Take bytes; ``offset`` is that of a job's `Region`, or of a `Copy`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a piece: one of its P matrices, and slices of their [B, N, K].

    ``out``: where its parts with rows go, by role.
    """

    p: int
    b: slice
    n: slice
    k: slice
    out: dict[str, NDArray[Any]]

    def of(self, part: Part) -> tuple[slice, slice, slice]:
        """The index of the chunk's items in all items of a part, [B, rows, items]."""
        rows = slice(self.n.start // part.rows, -(-self.n.stop // part.rows))
        items = slice(self.k.start // part.columns, -(-self.k.stop // part.columns))
        return self.b, rows, items


def cut(batch: Batch, budget: Budget, target: QuantFormat | None = None) -> list[tuple[int, int]]:
    """Ranges of stored rows that fit the stage; one if the batch does.

    ``target``: the format that the weights become; None if they are only looked at.
    """
    place = batch.place
    total, _ = place.stored_shape
    if batch.nbytes <= budget.stage_nbytes:
        return [(0, total)]
    if place.is_transposed:
        multiple = target.k_multiple if target else 1
    else:
        row_step = target.row_step if target else 1
        multiple = lcm(row_step, place.encoded.row_step) * (1 + place.is_interleaved)
    step = budget.stage_nbytes // place.stored_row_nbytes // multiple * multiple
    step = max(step, multiple)
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def matrices_of(place: Place, stored: Any) -> tuple[Any, ...]:
    """Views [B, N, K] of stored rows [B, rows, columns]: gate and up apart if they alternate."""
    matrices = stored.swapaxes(1, 2) if place.is_transposed else stored
    return (matrices[:, 0::2], matrices[:, 1::2]) if place.is_interleaved else (matrices,)


class PieceWriter:
    """The output buffers of one thread."""

    def __init__(self, engine: Engine, budget: Budget) -> None:
        self._engine = engine
        self._budget = budget

    def chunks(
        self,
        job: Job,
        batch: Batch,
        piece: tuple[int, int],
        shape: tuple[int, ...],
        out: Sink,
    ) -> Iterator[Chunk]:
        """The chunks of a piece [B, P, N, K], to be filled; after the last, it is written.

        A piece that is a part of every output row is gathered, and written with the last piece.
        """
        results = {
            part.role: (part, *self._buffer(part, job, piece, shape))
            for part in job.parts
            if not part.is_scalar
        }
        for p in range(shape[1]):
            for b, n, k in self._slices(job, shape):
                chunk = Chunk(p, b, n, k, {})
                for role, (part, _, view) in results.items():
                    chunk.out[role] = view[:, p][chunk.of(part)]
                yield chunk
        if job.is_gathered and piece[1] < job.place.stored_shape[0]:
            return
        for region in job.regions:
            if region.row_nbytes:
                part, buffer, _ = results[region.role]
                self._write(job, batch, piece, region, part, buffer, out)

    def _write(
        self,
        job: Job,
        batch: Batch,
        piece: tuple[int, int],
        region: Region,
        part: Part,
        buffer: NDArray[Any],
        out: Sink,
    ) -> None:
        start, stop = piece
        offset = region.offset + batch.start * region.slab_nbytes
        if job.is_gathered or stop - start == job.place.stored_shape[0]:
            write(out, offset, buffer)
        elif job.is_stacked:
            write(out, offset + start // part.columns * region.row_nbytes, buffer)
        else:
            for p in range(buffer.shape[1]):
                row = (p * job.place.rows[0] + start // buffer.shape[1]) // part.rows
                write(out, offset + row * region.row_nbytes, buffer[:, p])

    def _buffer(
        self, part: Part, job: Job, piece: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """A buffer in the order of the output, and its view [B, P, rows, items] for this piece."""
        B, P, N, K = shape
        rows, items = part.shape(N, K)
        if job.is_stacked:
            all_rows = job.place.slab_rows if job.is_gathered else rows
            buffer = self._empty(part, (B, items, all_rows))
            view = buffer.swapaxes(1, 2)[:, None]
            return buffer, view[:, :, piece[0] : piece[1]] if job.is_gathered else view
        if not job.is_gathered:
            buffer = self._empty(part, (B, P, rows, items))
            return buffer, buffer
        all_items = part.shape(N, job.place.columns)[1]
        buffer = self._empty(part, (B, P, rows, all_items))
        first = piece[0] // part.columns
        return buffer, buffer[..., first : first + items]

    def _empty(self, part: Part, shape: tuple[int, ...]) -> NDArray[Any]:
        return host_items(self._engine, f"out {part.role}", part.dtype, shape)

    def _slices(self, job: Job, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of matrices, of rows of one, or of columns, of about ``chunk_items`` weights."""
        B, _, N, K = shape
        target = find_format(job.format)
        items = self._budget.chunk_items
        matrices = items // (N * K)
        if matrices:
            for b in range(0, B, matrices):
                yield slice(b, min(b + matrices, B)), slice(0, N), slice(0, K)
            return
        rows = max(1, items // K // target.row_step) * target.row_step
        columns = K
        if rows * K > 2 * items and not target.amax_of_rows:
            # A recoded matrix is cut where neither format has a block.
            multiple = target.k_multiple
            if job.is_recoded:
                multiple = lcm(multiple, find_format(job.place.encoded.format).k_multiple)
            columns = max(1, items // rows // multiple) * multiple
        for b in range(B):
            for n in range(0, N, rows):
                for k in range(0, K, columns):
                    yield slice(b, b + 1), slice(n, min(n + rows, N)), slice(k, min(k + columns, K))


def write(out: Sink, offset: int, values: NDArray[Any]) -> None:
    """Write the bytes of an array, in the order of its items."""
    out.write(offset, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
