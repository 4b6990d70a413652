"""Largest magnitudes of the rows of slabs, and which weight it is that is no number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from ..errors import CheckpointError, show
from ..formats import QuantFormat
from ..source.stored import Place
from .batches import Batch, Budget
from .decode import Decoder
from .pieces import cut

_FLOAT32_MAX = float(np.finfo(np.float32).max)

__all__ = ["Magnitudes", "rows_of_piece"]


class Magnitudes:
    """Finds them with the engine of one thread."""

    def __init__(self, decoder: Decoder, engine: Engine, budget: Budget) -> None:
        self._decoder = decoder
        self._engine = engine
        self._budget = budget

    def of_rows(
        self,
        batch: Batch,
        pieces: Iterable[tuple[int, int]],
        whole: Any = None,
        target: QuantFormat | None = None,
    ) -> NDArray[np.float32]:
        """Largest magnitude of each row that the pieces hold of the slabs, float32 [B, N].

        ``whole`` is the only piece, if it is at hand. ``target``: the format that must hold them.

        Raises:
            CheckpointError: a weight is NaN or infinite, or too large for the format.
        """
        found = []
        for piece in pieces:
            stored = whole if whole is not None else self._decoder.weights(batch, *piece)
            found.append(self._of_piece(batch.place, stored))
        amax_BN = _joined(batch.place, found)
        limit = target.limit if target else _FLOAT32_MAX
        held = (amax_BN <= limit).all(1)
        if not held.all():
            self._refuse(batch, batch.start + int(held.argmin()), limit, target)
        return amax_BN

    def _of_piece(self, place: Place, stored: Any) -> NDArray[np.float32]:
        """The magnitudes of stored rows [B, rows, columns], in chunks for the cache."""
        B, rows, columns = stored.shape
        step = max(1, self._budget.chunk_items // (columns * B))
        chunks = (stored[:, at : at + step] for at in range(0, rows, step))
        axis = 1 if place.is_transposed else 2
        found = [self._engine.largest(chunk, axis) for chunk in chunks]
        return _joined(place, found)

    def _refuse(self, batch: Batch, slab: int, limit: float, target: QuantFormat | None) -> None:
        """Raise for the first weight of a slab that is not finite, or larger than the limit."""
        place = batch.place
        one = Batch(place, slab, slab + 1)
        for start, stop in cut(one, self._budget, target):
            stored = self._decoder.weights(one, start, stop)[0]
            values = self._engine.numbers(stored)
            wrong = ~(np.abs(values) <= limit)
            if wrong.any():
                row, column = np.argwhere(wrong)[0].tolist()
                value = float(values[row, column])
                member, row = _member_of(place, start + row)
                found = place.slabs[slab]
                why = "weights that are NaN or infinite cannot be quantized"
                if target and np.isfinite(value):
                    why = f"{target.name} has nothing above {limit:g}; choose another format"
                raise CheckpointError(
                    f"{show(found.reads[member][0].shard)}: {show(found.labels[member])}: weight "
                    f"is {value:g} at row {row}, column {column}; {why}"
                )
        raise AssertionError("amax was beyond the limit, and no weight is")


def _joined(place: Place, found: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What was found in pieces of slabs, [B, N]: each has some of the rows, or some columns."""
    joined: NDArray[np.float32]
    joined = np.maximum.reduce(found) if place.is_transposed else np.concatenate(found, 1)
    return joined


def rows_of_piece(
    place: Place, of_rows_BN: NDArray[np.float32], piece: tuple[int, int]
) -> tuple[NDArray[np.float32], ...]:
    """Numbers for all rows of slabs, cut to those of each matrix of a piece, [B, N]."""
    if not place.is_transposed:
        of_rows_BN = of_rows_BN[:, piece[0] : piece[1]]
    return (of_rows_BN[:, 0::2], of_rows_BN[:, 1::2]) if place.is_interleaved else (of_rows_BN,)


def _member_of(place: Place, row: int) -> tuple[int, int]:
    """Which source tensor holds a stored row of a slab, and which of its rows that is."""
    if place.is_transposed:
        return 0, row
    for member, count in enumerate(place.source_rows):
        if row < count:
            return member, row
        row -= count
    raise AssertionError("the row is beyond the slab")
