"""Largest magnitudes of the rows of slabs, and which weight it is that is no number."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .errors import CheckpointError, show
from .formats.amax import abs_max
from .formats.scratch import Scratch
from .loader import Loader
from .pieces import cut
from .plan import Job
from .schedule import Batch, Budget

__all__ = ["Magnitudes", "rows_of_piece"]


class Magnitudes:
    """Finds them with the buffers of one thread."""

    def __init__(self, loader: Loader, scratch: Scratch, budget: Budget) -> None:
        self._loader = loader
        self._scratch = scratch
        self._budget = budget

    def of_rows(
        self, batch: Batch, pieces: Iterable[tuple[int, int]], whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Largest magnitude of each row that the pieces hold of the slabs, float32 [B, N].

        ``whole`` is the only piece, if it is at hand.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        found = []
        for piece in pieces:
            stored = whole if whole is not None else self._loader.weights(batch, *piece)
            columns = stored.shape[2]
            if batch.job.is_transposed:
                step = max(1, self._budget.chunk_items // (columns * stored.shape[0]))
                chunks = [abs_max(c, self._scratch, dim=1) for c in torch.split(stored, step, 1)]
                found.append(torch.stack(chunks).amax(0))
            else:
                step = max(1, self._budget.chunk_items // columns)
                rows = torch.split(stored.flatten(0, 1), step)
                chunks = [abs_max(chunk, self._scratch) for chunk in rows]
                found.append(torch.cat(chunks).view(stored.shape[:2]))
        amax = torch.stack(found).amax(0) if batch.job.is_transposed else torch.cat(found, 1)
        finite = torch.isfinite(amax).all(1)
        if not bool(finite.all()):
            self._refuse(batch, batch.start + int(finite.logical_not().nonzero()[0]))
        return amax

    def _refuse(self, batch: Batch, slab: int) -> None:
        """Raise for the first weight of a slab that is not finite."""
        job = batch.job
        one = Batch(job, slab, slab + 1)
        for start, stop in cut(one, self._budget):
            stored = self._loader.weights(one, start, stop)[0]
            wrong = torch.isfinite(stored).logical_not()
            if bool(wrong.any()):
                row, column = (int(i) for i in wrong.nonzero()[0])
                value = float(stored[row, column])
                member, row = _member_of(job, start + row)
                found = job.slabs[slab]
                raise CheckpointError(
                    f"{show(found.reads[member][0].shard)}: {show(found.labels[member])}: weight "
                    f"is {value} at row {row}, column {column}; weights that are NaN or infinite "
                    "cannot be quantized"
                )
        raise AssertionError("amax was not finite, and every weight is")


def rows_of_piece(job: Job, amax_BN: torch.Tensor, piece: tuple[int, int]) -> torch.Tensor:
    """Of the amax of all rows of slabs, those of a piece, as its matrices [B, P, N]."""
    if not job.is_transposed:
        amax_BN = amax_BN[:, piece[0] : piece[1]]
    if job.is_interleaved:
        return amax_BN.view(amax_BN.shape[0], -1, 2).transpose(1, 2)
    return amax_BN.unsqueeze(1)


def _member_of(job: Job, row: int) -> tuple[int, int]:
    """Which source tensor holds a stored row of a slab, and which of its rows that is."""
    if job.is_transposed:
        return 0, row
    for member, count in enumerate(job.source_rows):
        if row < count:
            return member, row
        row -= count
    raise AssertionError("the row is beyond the slab")
