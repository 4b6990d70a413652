"""Bring rows of source slabs into memory: as they are stored, or decoded to numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine, host_items
from ..errors import CheckpointError, show
from ..formats import Part
from ..source.items import DTYPES, numbers
from ..source.stored import Place
from .batches import Batch, Budget
from .reader import SourceReader

__all__ = ["Decoder"]


class Decoder:
    """What one thread reads, into the buffers of its engine."""

    def __init__(self, reader: SourceReader, engine: Engine, budget: Budget) -> None:
        self._reader = reader
        self._engine = engine
        self._budget = budget

    def weights(self, batch: Batch, start: int, stop: int) -> Any:
        """Stored rows ``start`` to ``stop`` of each slab as numbers, [B, rows, columns].

        On the engine's device. Weights that are not quantized keep their dtype, others become
        float32.
        """
        if batch.place.encoded.is_plain:
            return self._engine.weights(self._rows(batch, start, stop))
        return self._decoded(batch, start, stop)

    def scales(self, batch: Batch, start: int, stop: int, one: int) -> Any:
        """What a code of 1 would stand for at each of these quantized weights.

        Like `weights`; ``one`` is the byte that codes of 1 are made of.
        """
        return self._decoded(batch, start, stop, one)

    def _decoded(self, batch: Batch, start: int, stop: int, one: int | None = None) -> Any:
        place = batch.place
        K = place.columns
        out = self._engine.empty("decoded", (batch.count, stop - start, K))
        step = place.encoded.row_step
        rows = max(1, self._budget.chunk_items // (batch.count * K) // step) * step
        at = 0
        for r, first, last in self.members(place, start, stop):
            scalars = self._scalars_of(batch, r)
            # Items of a part may cover several rows: begin with a whole item, and drop the rest.
            for aligned in range(first // step * step, last, rows):
                end = min(aligned + rows, last)
                parts = {
                    part.role: self._ones(batch, part, end - aligned, one)
                    if one is not None and part.role == "qweight"
                    else self._part(batch, r, part, aligned, end)
                    for part in place.encoded.parts
                    if not part.is_scalar
                }
                skip = max(first - aligned, 0)
                into = out[:, at : at + end - aligned - skip]
                self._engine.decode(place.encoded, parts | scalars, into, skip)
                at += end - aligned - skip
        return out

    def parts(self, batch: Batch, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Stored rows ``start`` to ``stop`` of each part that has rows, [B, rows, items].

        On the host. ``start`` begins a whole item of every part, in every source tensor.

        Raises:
            CheckpointError: a weight or a scale is no number.
        """
        place = batch.place
        found = {}
        for part in place.encoded.parts:
            if part.is_scalar:
                continue
            if place.encoded.is_plain:
                found[part.role] = self._rows(batch, start, stop)
                continue
            pieces = []
            for r, first, last in self.members(place, start, stop):
                piece = self._part(batch, r, part, first, last)
                if part.dtype == "F8_E4M3" and part.role == "qweight" and _has_nan(piece):
                    values = numbers(piece, part.dtype)
                    _refuse(np.isnan(values), batch, r, "weight", values, first)
                pieces.append(piece if len(place.source_rows) == 1 else piece.copy())
            found[part.role] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)
        return found

    def scalars(self, batch: Batch, role: str) -> NDArray[np.float32]:
        """A scalar part of every source tensor of every slab, float32 [B, R].

        Raises:
            CheckpointError: one is not a finite number above 0.
        """
        members = len(batch.slabs[0].reads)
        index, part = next(
            (i, p) for i, p in enumerate(batch.place.encoded.parts) if p.role == role
        )
        raw = np.empty((batch.count, members), DTYPES[part.dtype])
        for b, slab in enumerate(batch.slabs):
            for r, reads in enumerate(slab.reads):
                self._reader.read(reads[index], 0, _bytes(raw[b, r : r + 1]))
        found = numbers(raw, part.dtype)
        for b, r in np.argwhere(~(np.isfinite(found) & (found > 0))).tolist():
            raise CheckpointError(
                f"{show(batch.slabs[b].labels[r])}: its {role} is {float(found[b, r])}; expected a "
                "finite number above 0"
            )
        return found

    def _scalars_of(self, batch: Batch, r: int) -> dict[str, NDArray[np.float32]]:
        """What a codec needs beside the parts with rows, for source tensor ``r``: [B] each."""
        encoded = batch.place.encoded
        found = {}
        for part in encoded.parts:
            if part.is_scalar and part.role != "input_scale":
                inverse = part.role in encoded.inverse
                role = part.role.replace("scale", "divisor") if inverse else part.role
                found[role] = self.scalars(batch, part.role)[:, r]
        return found

    def members(self, place: Place, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The source tensors that hold rows ``start`` to ``stop`` of a slab, and their own rows."""
        before = 0
        for r, count in enumerate(place.source_rows):
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                yield r, first, last
            before += count

    def _part(self, batch: Batch, r: int, part: Part, start: int, stop: int) -> NDArray[Any]:
        """The items of a part for rows ``start`` to ``stop`` of source tensor ``r``."""
        place = batch.place
        index = place.encoded.parts.index(part)
        first, last = start // part.rows, -(-stop // part.rows)
        row_nbytes = part.row_nbytes(place.columns)
        shape = (batch.count, *part.shape(1, place.columns))
        items = host_items(self._engine, part.role, part.dtype, (shape[0], last - first, shape[2]))
        for b, slab in enumerate(batch.slabs):
            self._reader.read(slab.reads[r][index], first * row_nbytes, _bytes(items[b]))
        if part.role != "qweight":
            values = numbers(items, part.dtype)
            # Zero is what some write for zeros.
            bad = ~(np.isfinite(values) & (values >= 0))
            _refuse(bad, batch, r, part.role, values, first)
        return items

    def _ones(self, batch: Batch, part: Part, rows: int, one: int) -> NDArray[Any]:
        """Codes of 1."""
        shape = (batch.count, *part.shape(rows, batch.place.columns))
        items = host_items(self._engine, part.role, part.dtype, shape)
        items.view(np.uint8)[...] = one
        return items

    def _rows(self, batch: Batch, start: int, stop: int) -> NDArray[Any]:
        """Stored rows of weights that are not quantized, whatever their orientation."""
        place = batch.place
        row_nbytes, columns = place.stored_row_nbytes, place.stored_shape[1]
        rows = host_items(
            self._engine, "weights", place.dtype, (batch.count, stop - start, columns)
        )
        for position, slab in enumerate(batch.slabs):
            into = _bytes(rows[position])
            skip = start * row_nbytes
            for (read,) in slab.reads:
                if skip >= read.nbytes:
                    skip -= read.nbytes
                    continue
                count = min(read.nbytes - skip, len(into))
                self._reader.read(read, skip, into[:count])
                into, skip = into[count:], 0
                if not into:
                    break
        return rows


def _bytes(items: NDArray[Any]) -> memoryview:
    """The bytes of contiguous items, to be filled."""
    return items.reshape(-1).view(np.uint8).data


def _has_nan(codes: NDArray[Any]) -> bool:
    """Whether E4M3 codes hold 0x7F or 0xFF."""
    return bool((codes & np.uint8(0x7F)).max() == 0x7F)


def _refuse(
    bad: NDArray[np.bool_],
    batch: Batch,
    r: int,
    role: str,
    values: NDArray[np.float32],
    first: int,
) -> None:
    """Raise for the first bad item of [B, rows, items], rows counted from ``first``."""
    if not bad.any():
        return
    b, row, column = np.argwhere(bad)[0].tolist()
    slab, value = batch.slabs[b], float(values[b, row, column])
    raise CheckpointError(
        f"{show(slab.reads[r][0].shard)}: {show(slab.labels[r])}: {role} is {value} at row "
        f"{first + row}, column {column}; expected a finite number"
        f"{'' if role == 'weight' else ', 0 or above'}"
    )
