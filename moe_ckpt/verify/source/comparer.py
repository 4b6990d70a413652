"""Compare single pairs, as one thread does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...dtypes import nbytes_of
from ...engines import Engine
from ...errors import CheckpointError
from ...formats import Part, find_format
from ...formats.nvfp4_from_mxfp4 import global_scale
from ...formats.scales import scale_of
from ...plan import Job
from ...work.batches import Batch, Budget
from ...work.reader import SourceReader
from ...work.worker import Worker
from .distance import Distance, distance
from .lookup import Lookup
from .matrices import Matrix, MatrixReader
from .pairs import CopyPair, MatrixPair
from .sink import Comparison, Segment, Unequal

__all__ = ["Compared", "Comparer", "Measured"]


class Measured(NamedTuple):
    """A matrix, its place in `Lookup`, what to call it, and how far it is from its source."""

    name: str
    module: str
    format: str
    distance: Distance


@dataclass(slots=True)
class Compared:
    """What a pair gave.

    ``unequal``: what differs from what would be written; None if that was not looked at.
    ``shared``: the amax that the scale of stacked experts stands for.
    ``failure``: which weight could not be compared, and why; None if all were.
    """

    measured: list[Measured] = field(default_factory=list)
    unequal: Mapping[str, Unequal] | None = None
    failure: tuple[str, str] | None = None
    shared: float | None = None


class Comparer:
    """Reads both checkpoints with the engine of one thread."""

    def __init__(
        self,
        here: SourceReader,
        there: SourceReader,
        engine: Engine,
        budget: Budget,
        lookup: Lookup,
        *,
        is_ours: bool,
    ) -> None:
        self._is_ours = is_ours
        self._there = there
        self._chunk_items = budget.chunk_items
        self._lookup = lookup
        self._sides = MatrixReader(here, engine, budget), MatrixReader(there, engine, budget)

    def copied(self, worker: Worker, pair: CopyPair) -> Compared:
        """Whether bytes are there as they are in the source."""
        sink = Comparison(self._there, pair.segments)
        worker.copy(pair.copy, sink)
        return Compared(unequal=sink.unequal)

    def converted(self, worker: Worker, pair: MatrixPair) -> Compared:
        """How far matrices are from those of the source, and whether they are made again alike."""
        found = Compared()
        names = [name for name in pair.names if name is not None]
        at = names[0]
        try:
            for part, name in enumerate(pair.names):
                if name is not None:
                    at = name
                    found.measured += self._measure(pair, part, name)
            at = names[0]
            if pair.job:
                found.shared = self._shared(pair, pair.job) if pair.job.is_stacked else None
                found.unequal = self._made_again(worker, pair, pair.job, found.shared)
        except CheckpointError as error:
            found.failure = at, str(error)
        return found

    def _measure(self, pair: MatrixPair, part: int, name: str) -> Iterator[Measured]:
        """How far a matrix is from the source, unless its bytes say all there is to know."""
        wanted, matrix = Matrix(pair.place, pair.slab, part), self._lookup.matrix(name)
        source, there = self._sides
        module = name.removesuffix(".weight")
        theirs = matrix.place.encoded
        is_copied = pair.place.encoded.is_plain and theirs.is_plain
        by_bytes = pair.job is not None and (self._is_ours or is_copied)
        if by_bytes and theirs.is_plain:
            return
        found = distance(
            source,
            wanted,
            there,
            matrix,
            chunk_items=self._chunk_items,
            is_bounded=not by_bytes,
        )
        yield Measured(name, module, theirs.format, found)

    def _made_again(
        self, worker: Worker, pair: MatrixPair, job: Job, shared: float | None
    ) -> Mapping[str, Unequal]:
        sink = Comparison(self._there, self._segments(pair, job))
        worker.convert(job, Batch(job.place, pair.slab, pair.slab + 1), sink, shared)
        return sink.unequal

    def _segments(self, pair: MatrixPair, job: Job) -> list[Segment]:
        """Where the job of a pair would write the slab, and where that is there.

        Not its input scales: they come from statistics.
        """
        parts = {part.role: part for part in job.parts}
        segments = []
        for region in job.regions:
            start = region.offset
            if region.row_nbytes or not job.is_stacked:
                start += pair.slab * region.slab_nbytes
            for name, rows in zip(pair.names, job.place.rows, strict=True):
                assert name is not None
                for part, info, read in self._lookup.parts(name):
                    if part.role == region.role != "input_scale":
                        segments.append(Segment(start, info, read))
                start += _nbytes(parts[region.role], rows, job)
        return segments

    def _shared(self, pair: MatrixPair, job: Job) -> float | None:
        """What all experts of a stack share, from the scale that is there.

        To find it anew all of them would have to be read. It is enough to know it up to what is
        divided to the same scale.
        """
        target = find_format(job.format)
        (name,) = pair.names
        assert name is not None
        read = next((r for p, _, r in self._lookup.parts(name) if p.role == "global_scale"), None)
        if read is None or not target.largest:
            return None
        stored = np.empty(1, np.float32)
        self._there.read(read, 0, stored.view(np.uint8).data)
        if job.is_recoded:
            if pair.place.encoded.format not in target.exact_from:
                return None
            exponents = np.arange(-200, 129, dtype=np.int32)
            (known,) = np.nonzero(global_scale(exponents) == stored)
            shared = float(exponents[known[0]]) if len(known) else None
        else:
            amax = stored * np.float32(target.largest)
            near = np.concatenate([amax, np.nextafter(amax, 0), np.nextafter(amax, np.inf)])
            (known,) = np.nonzero(scale_of(near.astype(np.float32), target.largest) == stored)
            shared = float(near[known[0]]) if len(known) else None
        if shared is None:
            raise CheckpointError(f"no weights have the global scale {float(stored[0]):.9g}")
        return shared


def _nbytes(part: Part, rows: int, job: Job) -> int:
    return nbytes_of(part.dtype, part.shape(rows, job.place.columns))
