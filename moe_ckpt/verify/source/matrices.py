"""Rows of single matrices as numbers, wherever and however a checkpoint stores them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...engines import Engine
from ...errors import CheckpointError, show
from ...formats import Part
from ...source.items import DTYPES, numbers
from ...source.stored import Place
from ...work.batches import Batch, Budget
from ...work.decode import Decoder
from ...work.reader import SourceReader

__all__ = ["Matrix", "MatrixReader"]


class Matrix(NamedTuple):
    """One of the matrices [N, K] that a slab holds."""

    place: Place
    slab: int
    part: int

    @property
    def rows(self) -> int:
        """N."""
        return self.place.rows[self.part]

    @property
    def stored_rows(self) -> slice:
        """Where its rows are among those of the slab; columns if the slab is transposed."""
        if self.place.is_interleaved:
            return slice(self.part, None, len(self.place.rows))
        start = sum(self.place.rows[: self.part])
        return slice(start, start + self.rows, 1)


class MatrixReader:
    """Reads matrices of one checkpoint, for one thread.

    When slabs are stored transposed it keeps as many columns as fit half of the stage: they are
    read with a call for every row.
    """

    def __init__(self, reader: SourceReader, engine: Engine, budget: Budget) -> None:
        self._reader = reader
        self._engine = engine
        self._budget = budget
        self._decoder = Decoder(reader, engine, budget)
        self._kept: tuple[Matrix, int, dict[str, NDArray[Any]]] | None = None

    def values(self, matrix: Matrix, start: int, stop: int) -> NDArray[np.float32]:
        """The numbers in rows ``start`` to ``stop``, float32 [rows, K].

        Raises:
            CheckpointError: a scale is no number.
        """
        return self._rows(matrix, start, stop, None)

    def scales(self, matrix: Matrix, start: int, stop: int, one: int) -> NDArray[np.float32]:
        """What a code of 1 stands for at each weight of these rows; see `Decoder.scales`."""
        return self._rows(matrix, start, stop, one)

    def _rows(self, matrix: Matrix, start: int, stop: int, one: int | None) -> NDArray[np.float32]:
        place = matrix.place
        if place.is_transposed:
            return self._columns(matrix, start, stop, one)
        where = matrix.stored_rows
        first, last = where.start + start, where.start + stop
        if where.step > 1:
            first, last = where.step * start, where.step * stop
        batch = Batch(place, matrix.slab, matrix.slab + 1)
        if one is None:
            found = self._decoder.weights(batch, first, last)
        else:
            found = self._decoder.scales(batch, first, last, one)
        values = self._engine.numbers(found)[0]
        return np.array(values[where.start :: where.step] if where.step > 1 else values)

    def _columns(
        self, matrix: Matrix, start: int, stop: int, one: int | None
    ) -> NDArray[np.float32]:
        """The same of a slab that is stored transposed, [K, rows]."""
        place = matrix.place
        first, parts = self._block(matrix, start, stop)
        found = {
            role: np.ascontiguousarray(items[:, start - first : stop - first].T)[None]
            for role, items in parts.items()
        }
        if place.encoded.is_plain:
            return np.array(numbers(found["qweight"][0], place.dtype))
        if one is not None:
            found["qweight"].view(np.uint8)[...] = one
        batch = Batch(place, matrix.slab, matrix.slab + 1)
        for part in place.encoded.parts:
            if part.is_scalar and part.role != "input_scale":
                found[part.role] = self._decoder.scalars(batch, part.role)[:, 0]
            elif not part.is_scalar and part.role != "qweight":
                _refuse_bad(found[part.role], part, place, matrix.slab)
        out = self._engine.empty("decoded", (1, stop - start, place.columns))
        self._engine.decode(place.encoded, found, out, 0)
        return np.array(self._engine.numbers(out)[0])

    def _block(self, matrix: Matrix, start: int, stop: int) -> tuple[int, dict[str, NDArray[Any]]]:
        """Items [items, rows] of each part, of rows around these, and the first of those rows."""
        kept = self._kept
        if kept and _is_same(kept[0], matrix) and kept[1] <= start:
            first, found = kept[1:]
            if stop <= first + found["qweight"].shape[1]:
                return first, found
        self._kept = None  # before its successor is made
        place = matrix.place
        nbytes = sum(part.row_nbytes(place.columns) for part in place.encoded.parts)
        end = min(matrix.rows, max(stop, start + self._budget.stage_nbytes // 2 // nbytes))
        found = {
            part.role: self._part(matrix, index, part, start, end)
            for index, part in enumerate(place.encoded.parts)
            if not part.is_scalar
        }
        self._kept = matrix, start, found
        return start, found

    def _part(self, matrix: Matrix, index: int, part: Part, start: int, stop: int) -> NDArray[Any]:
        place, where = matrix.place, matrix.stored_rows
        (reads,) = place.slabs[matrix.slab].reads
        kind = np.dtype(DTYPES[part.dtype])
        items = part.shape(1, place.columns)[1]
        rows = np.empty((items, (stop - start) * where.step), kind)
        first = where.start + start if where.step == 1 else where.step * start
        stored = rows.view(np.uint8)
        for row in range(items):
            at = (row * place.slab_rows + first) * kind.itemsize
            self._reader.read(reads[index], at, stored[row].data)
        return rows[:, where.start :: where.step] if where.step > 1 else rows


def _is_same(one: Matrix, two: Matrix) -> bool:
    return one.place is two.place and one[1:] == two[1:]  # to compare places takes long


def _refuse_bad(items: NDArray[Any], part: Part, place: Place, slab: int) -> None:
    values = numbers(items, part.dtype)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise CheckpointError(
            f"{show(place.slabs[slab].labels[0])}: {part.role} is {float(values[bad][0])}; "
            "expected a finite number, 0 or above"
        )
