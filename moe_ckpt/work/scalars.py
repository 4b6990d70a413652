"""The parts of matrices that are one number: of which they are made, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..formats import find_format
from ..formats.scales import scale_of
from ..plan import Job
from .batches import Batch
from .decode import Decoder
from .pieces import Sink, write

__all__ = ["ratios_of", "stored_scalars", "write_scalars"]


def write_scalars(
    job: Job, batch: Batch, values: Mapping[str, NDArray[np.floating]], decoder: Decoder, out: Sink
) -> None:
    """Write the scalars of a batch, its input scales too.

    ``values`` holds those of the weights by role, as they multiply: [B] for slabs, or [B, P] for
    their matrices. Slabs that are stacked have one, which is written with the first.
    """
    if job.is_stacked and batch.start > 0:
        return
    for region in job.regions:
        if region.row_nbytes:
            continue
        is_input = region.role == "input_scale"
        value = _input_scale(job, batch, decoder) if is_input else values[region.role]
        value = np.broadcast_to(
            value.reshape(batch.count, -1), (batch.count, len(batch.place.rows))
        )
        if job.is_stacked:
            value = value[0, :1]
        if region.role in job.inverse:
            value = 1 / value
        write(out, region.offset + batch.start * region.slab_nbytes, value.astype(np.float32))


def _input_scale(job: Job, batch: Batch, decoder: Decoder) -> NDArray[np.floating]:
    """Activation scales: from statistics, from the source, or 1.0."""
    if job.input_amax is not None:
        amax = np.full(batch.count, job.input_amax, np.float32)
        return scale_of(amax, find_format(job.format).largest)
    if job.is_recoded and batch.place.encoded.has_input_scale:
        return stored_scalars(job, batch, "input_scale", decoder)
    return np.ones(batch.count, np.float32)


def stored_scalars(job: Job, batch: Batch, role: str, decoder: Decoder) -> NDArray[np.float64]:
    """A scalar of the source for every output matrix, as it multiplies: float64 [B, P].

    Where matrices must share it, it is the largest of the slab, see `ratios_of`.

    Raises:
        CheckpointError: one is no number above 0.
    """
    exact = decoder.scalars(batch, role).astype(np.float64)
    if role in batch.place.encoded.inverse:
        exact = 1 / exact  # the reciprocal of a reciprocal is the number again
    if role == "global_scale" and find_format(job.format).shares_dense_amax:
        exact = exact.max(1, keepdims=True)
    return np.broadcast_to(exact, (batch.count, len(batch.place.rows)))


def ratios_of(
    job: Job, batch: Batch, decoder: Decoder
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Each source tensor's global scale over the largest of its slab: numerators, denominators.

    Float32 [B, R] both; None if all agree, or need not.
    """
    if len(batch.place.source_rows) == 1 or not find_format(job.format).shares_dense_amax:
        return None
    found = decoder.scalars(batch, "global_scale")
    if (found == found[:, :1]).all():
        return None
    if "global_scale" in batch.place.encoded.inverse:
        return np.broadcast_to(found.min(1, keepdims=True), found.shape), found
    return found, np.broadcast_to(found.max(1, keepdims=True), found.shape)
