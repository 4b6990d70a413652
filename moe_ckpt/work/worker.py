"""Turn a batch of source slabs into output bytes: read, find amax, quantize or recode, write.

The same code runs on a CPU and on CUDA. How slabs are cut into batches, pieces and chunks decides
the memory that is used, and no byte: amax is exact, and everything after it works on blocks that
no cut divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine
from ..formats import Cast, find_format
from ..formats.nvfp4_rescaled import rescale
from ..formats.scales import scale_of
from ..plan import Copy, Job
from ..source.items import DTYPES, numbers
from ..source.stored import Place
from .batches import Batch, Budget, split
from .decode import Decoder
from .magnitudes import Magnitudes, rows_of_piece
from .pieces import PieceWriter, Sink, cut, matrices_of, write
from .reader import SourceReader
from .scalars import ratios_of, stored_scalars, write_scalars

__all__ = ["Worker"]

T = TypeVar("T")
_LEAST_STAGE_NBYTES = 1 << 12  # with less, it is not the size of our buffers

Scalars = Mapping[str, NDArray[np.floating]]


class Worker:
    """The buffers of one thread, and what it does with them.

    ``inexact_blocks`` counts blocks whose codes or scales were rounded again: of MXFP4 those that
    NVFP4 could not hold exactly, of NVFP4 those that could not be held under another global scale.
    """

    def __init__(self, reader: SourceReader, engine: Engine, budget: Budget) -> None:
        self._reader = reader
        self._engine = engine
        self.inexact_blocks = 0
        self._use(budget)

    def _use(self, budget: Budget) -> None:
        self._budget = budget
        self._decoder = Decoder(self._reader, self._engine, budget)
        self._magnitudes = Magnitudes(self._decoder, self._engine, budget)
        self._pieces = PieceWriter(self._engine, budget)

    def copy(self, item: Copy, out: Sink) -> int:
        """Copy bytes; returns how many were read."""
        if item.pair_nbytes:
            raw = np.empty(item.read.nbytes, np.uint8)
            self._reader.read(item.read, 0, raw.data)
            write(out, item.offset, raw.reshape(-1, 2, item.pair_nbytes // 2).swapaxes(0, 1))
            return item.read.nbytes
        buffer = self._engine.host("weights", self._budget.stage_nbytes).data
        for start in range(0, item.read.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), item.read.nbytes - start)]
            self._reader.read(item.read, start, piece)
            out.write(item.offset + start, piece)
        self._reader.forget(item.read)
        return item.read.nbytes

    def amax(self, batch: Batch) -> list[float]:
        """The largest magnitude of each slab.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        return [value for values in self._in_parts(self._amax, batch) for value in values]

    def largest(self, job: Job, batch: Batch) -> list[float]:
        """What slabs of a job that are stacked must agree on: the largest one of all counts.

        It is the largest magnitude; of MXFP4 that is cast, the largest exponent.
        """
        cast = _cast_of(job)
        if cast is None:
            return self.amax(batch)
        parts = self._in_parts(partial(self._max_exponent, cast), batch)
        return [float(value) for values in parts for value in values.tolist()]

    def convert(self, job: Job, batch: Batch, out: Sink, shared: float | None = None) -> int:
        """Write all output of a batch of a job; returns the source bytes it was made of.

        ``shared`` is the largest that `largest` found, of slabs that share it with others.

        Raises:
            CheckpointError: a weight is NaN or infinite, or too large for the format, or scales
                contradict each other.
        """
        for _ in self._in_parts(partial(self._convert, job, out=out, shared=shared), batch):
            pass
        reads = [read for slab in batch.slabs for reads in slab.reads for read in reads]
        for read in reads:
            self._reader.forget(read)
        return sum(read.nbytes for read in reads)

    def _in_parts(self, work: Callable[[Batch], T], batch: Batch) -> Iterator[T]:
        """Do a batch; with buffers half as large, and again, if the device has no room."""
        for part in split(batch, self._budget):
            try:
                done = work(part)
            except self._engine.out_of_memory:
                if self._budget.stage_nbytes < _LEAST_STAGE_NBYTES:
                    raise
            else:
                yield done
                continue
            self._engine.release()
            self._use(self._budget.halved())
            yield from self._in_parts(work, part)

    def _amax(self, batch: Batch) -> list[float]:
        rows = self._magnitudes.of_rows(batch, cut(batch, self._budget))
        found: list[float] = rows.max(1).tolist()
        return found

    def _convert(self, job: Job, batch: Batch, out: Sink, shared: float | None) -> None:
        if not job.is_recoded:
            scalars = self._quantize(job, batch, out, shared)
        elif cast := _cast_of(job):
            scalars = self._cast(cast, job, batch, out, shared)
        else:
            scalars = self._move(job, batch, out)
        write_scalars(job, batch, scalars, self._decoder, out)

    def _quantize(self, job: Job, batch: Batch, out: Sink, shared: float | None) -> Scalars:
        """Round weights to the parts of a format; returns its scalars."""
        place, target = batch.place, find_format(job.format)
        pieces = cut(batch, self._budget, target)
        whole = self._decoder.weights(batch, *pieces[0]) if len(pieces) == 1 else None
        outputs = job.outputs[batch.start : batch.stop]
        known = [shared if shared is not None else output.amax for output in outputs]
        if None in known or target.amax_of_rows:
            amax_BN = self._magnitudes.of_rows(batch, pieces, whole, target)
            amax = amax_BN if target.amax_of_rows else amax_BN.max(1)
        else:
            amax = np.array(known, np.float32)
        scale = scale_of(amax, target.largest) if target.largest else None
        for piece in pieces:
            stored = whole if whole is not None else self._decoder.weights(batch, *piece)
            matrices = matrices_of(place, stored)
            scales: tuple[NDArray[np.float32] | None, ...] = (scale,) * len(matrices)
            if scale is not None and target.amax_of_rows:
                scales = rows_of_piece(place, scale, piece)
            B, N, K = matrices[0].shape
            for chunk in self._pieces.chunks(job, batch, piece, (B, len(matrices), N, K), out):
                weight_BNK = matrices[chunk.p][chunk.b, chunk.n, chunk.k]
                of_chunk = scales[chunk.p]
                if of_chunk is not None:
                    of_chunk = (
                        of_chunk[chunk.b, chunk.n] if target.amax_of_rows else of_chunk[chunk.b]
                    )
                self._engine.quantize(target, weight_BNK, of_chunk, chunk.out)
        return {} if scale is None else {"global_scale": scale}

    def _move(self, job: Job, batch: Batch, out: Sink) -> Scalars:
        """Parts as they are, under other names and in another order; returns the scalars."""
        place = batch.place
        dtypes = {part.role: part.dtype for part in place.encoded.parts}
        ratios = ratios_of(job, batch, self._decoder)
        for piece in cut(batch, self._budget, find_format(job.format)):
            stored = self._decoder.parts(batch, *piece)
            if ratios:
                self._share_scale(batch.place, piece, stored, *ratios)
            if place.encoded.is_plain:
                weights = self._engine.weights(stored["qweight"])
                self._magnitudes.of_rows(batch, [piece], weights)
            views = {role: matrices_of(place, items) for role, items in stored.items()}
            B, N, _ = views["qweight"][0].shape
            columns = piece[1] - piece[0] if place.is_transposed else place.columns
            shape = (B, len(views["qweight"]), N, columns)
            for chunk in self._pieces.chunks(job, batch, piece, shape, out):
                for part in job.parts:
                    if not part.is_scalar:
                        items = views[part.role][chunk.p][chunk.of(part)]
                        if DTYPES[dtypes[part.role]] != DTYPES[part.dtype]:
                            items = numbers(items, dtypes[part.role])
                        np.copyto(chunk.out[part.role], items)
        roles = [part.role for part in job.parts if part.is_scalar and part.role != "input_scale"]
        return {role: stored_scalars(job, batch, role, self._decoder) for role in roles}

    def _share_scale(
        self,
        place: Place,
        piece: tuple[int, int],
        stored: Mapping[str, NDArray[Any]],
        numerators_BR: NDArray[np.float32],
        denominators_BR: NDArray[np.float32],
    ) -> None:
        """Bring the rows of each source tensor in a piece under the global scale of the slab."""
        at = 0
        for r, first, last in self._decoder.members(place, *piece):
            rows = slice(at, at + last - first)
            at = rows.stop
            parts = {role: items[:, rows] for role, items in stored.items()}
            self.inexact_blocks += rescale(parts, numerators_BR[:, r], denominators_BR[:, r])

    def _cast(self, cast: Cast, job: Job, batch: Batch, out: Sink, shared: float | None) -> Scalars:
        """The same codes under other scales; returns the global ones."""
        place = batch.place
        if shared is None:
            exponent_B = self._max_exponent(cast, batch)
        else:
            exponent_B = np.full(batch.count, int(shared), np.int32)
        for piece in cut(batch, self._budget, find_format(job.format)):
            stored = self._decoder.parts(batch, *piece)
            views = {role: matrices_of(place, items) for role, items in stored.items()}
            B, N, _ = views["qweight"][0].shape
            shape = (B, len(views["qweight"]), N, place.columns)
            for chunk in self._pieces.chunks(job, batch, piece, shape, out):
                parts = {
                    part.role: views[part.role][chunk.p][chunk.of(part)]
                    for part in place.encoded.parts
                }
                self.inexact_blocks += cast.cast(parts, exponent_B[chunk.b], chunk.out)
        return {"global_scale": cast.global_scale(exponent_B)}

    def _max_exponent(self, cast: Cast, batch: Batch) -> NDArray[np.int32]:
        """The largest exponent of each slab's blocks, int32 [B]."""
        found = [
            cast.max_exponent(self._decoder.parts(batch, *piece))
            for piece in cut(batch, self._budget)
        ]
        largest: NDArray[np.int32] = np.maximum.reduce(found)
        return largest


def _cast_of(job: Job) -> Cast | None:
    """What casts the weights of a job, if their codes stay and get other scales."""
    return find_format(job.format).cast_from(find_format(job.place.encoded.format))
