"""The parts of matrices that are one number: of which they are made, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, show
from ..formats import find_format
from ..formats.scales import scale_of
from ..plan import Job
from .batches import Batch
from .decode import Decoder
from .pieces import Sink, write

__all__ = ["stored_scalars", "write_scalars"]


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

    Raises:
        CheckpointError: one is no number above 0, or those of NVFP4 differ in a slab.
    """
    found = decoder.scalars(batch, role)
    must_agree = role == "global_scale" and find_format(job.format).shares_dense_amax
    for b in np.flatnonzero((found != found[:, :1]).any(1)).tolist() if must_agree else ():
        raise CheckpointError(
            f"{show(batch.slabs[b].labels[0])} and {show(batch.slabs[b].labels[-1])}: have "
            f"different global scales, {' and '.join(map(str, found[b].tolist()))}, and "
            "runtimes use one for both; convert with --format bf16 first, then again"
        )
    exact = found.astype(np.float64)  # the reciprocal of a reciprocal is the number again
    if role in batch.place.encoded.inverse:
        exact = 1 / exact
    return np.broadcast_to(exact, (batch.count, len(batch.place.rows)))
