"""Turn a batch of source slabs into output bytes: read, find amax, quantize, write.

The same code runs on a CPU and on CUDA. How slabs are cut into batches and chunks decides the
memory that is used, and no byte: amax is exact, and everything after it works on blocks that no
chunk divides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import CheckpointError, show
from .formats import QuantFormat
from .formats.amax import abs_max
from .formats.scratch import Scratch
from .plan import Copy, Job, Slab
from .reader import SourceReader
from .schedule import Batch, Budget
from .writer import ShardWriter

__all__ = ["Worker"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


class Worker:
    """The buffers of one thread, and what it does with them."""

    def __init__(
        self,
        reader: SourceReader,
        number_format: QuantFormat,
        device: torch.device,
        budget: Budget,
    ) -> None:
        self._reader = reader
        self._codec = number_format.codec()
        self._dtypes = {part.role: part.dtype for part in number_format.parts}
        self._scratch = Scratch(device)
        self._device = device
        self._budget = budget
        pinned = device.type == "cuda"
        self._stage = torch.empty(budget.stage_nbytes, dtype=torch.uint8, pin_memory=pinned)

    def copy(self, item: Copy, out: ShardWriter) -> int:
        """Copy a tensor byte for byte; returns the bytes read."""
        buffer = self._stage.numpy().data
        for start in range(0, item.read.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), item.read.nbytes - start)]
            self._reader.read(item.read, start, piece)
            out.write(item.offset + start, piece)
        return item.read.nbytes

    def quantize(self, batch: Batch, out: ShardWriter) -> int:
        """Quantize a batch; returns the source bytes read, each counted once.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        job = batch.job
        slabs = job.slabs[batch.start : batch.stop]
        if batch.nbytes <= self._budget.stage_nbytes:
            weight_BNK = self._load(job, slabs, 0, job.slab_rows)
            amax_B = self._amax(weight_BNK)
            self._refuse_not_finite(amax_B, job, slabs)
            self._write_rows(batch, 0, weight_BNK, amax_B, out)
        else:
            pieces = list(self._row_pieces(job))
            amax_B = torch.stack([self._amax(self._load(job, slabs, *p)) for p in pieces]).amax(0)
            self._refuse_not_finite(amax_B, job, slabs)
            for start, stop in pieces:
                weight_BNK = self._load(job, slabs, start, stop)
                self._write_rows(batch, start, weight_BNK, amax_B, out)
        self._write_scalars(batch, amax_B, out)
        return batch.nbytes

    def _row_pieces(self, job: Job) -> Iterator[tuple[int, int]]:
        """Row ranges of one slab that fit the stage, for slabs that do not."""
        row_nbytes = job.slab_nbytes // job.slab_rows
        step = max(1, self._budget.stage_nbytes // row_nbytes)
        if row_nbytes > self._stage.numel():
            self._stage = torch.empty(row_nbytes, dtype=torch.uint8)
        for start in range(0, job.slab_rows, step):
            yield start, min(start + step, job.slab_rows)

    def _load(self, job: Job, slabs: tuple[Slab, ...], start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of each slab, [B, rows, K] on the device."""
        row_nbytes = job.slab_nbytes // job.slab_rows
        nbytes = (stop - start) * row_nbytes
        buffer = self._stage.numpy().data
        for position, slab in enumerate(slabs):
            into = buffer[position * nbytes : (position + 1) * nbytes]
            skip = start * row_nbytes
            for read in slab.reads:
                if skip >= read.nbytes:
                    skip -= read.nbytes
                    continue
                count = min(read.nbytes - skip, len(into))
                self._reader.read(read, skip, into[:count])
                into, skip = into[count:], 0
                if not into:
                    break
        staged = self._stage[: len(slabs) * nbytes].view(_DTYPES[job.dtype])
        return staged.view(len(slabs), stop - start, job.columns).to(self._device)

    def _amax(self, weight_BNK: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each matrix, float32 [B]."""
        rows = weight_BNK.flatten(0, 1)
        step = max(1, self._budget.chunk_items // max(rows.shape[1], 1))
        row_amax = torch.cat([abs_max(chunk, self._scratch) for chunk in torch.split(rows, step)])
        return row_amax.view(weight_BNK.shape[:2]).amax(1)

    def _chunks(self, weight_BNK: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Slices of matrices, or of rows of one, of about ``chunk_items`` weights."""
        B, N, K = weight_BNK.shape
        matrices = self._budget.chunk_items // (N * K)
        if matrices:
            for b in range(0, B, matrices):
                yield slice(b, b + matrices), slice(0, N)
            return
        rows = max(1, self._budget.chunk_items // K)
        for b in range(B):
            for n in range(0, N, rows):
                yield slice(b, b + 1), slice(n, n + rows)

    def _write_rows(
        self,
        batch: Batch,
        first_row: int,
        weight_BNK: torch.Tensor,
        amax_B: torch.Tensor,
        out: ShardWriter,
    ) -> None:
        """Quantize rows from ``first_row`` on, and write every part that has rows."""
        B, N, _ = weight_BNK.shape
        regions = [region for region in batch.job.regions if region.row_nbytes]
        results = {}
        for region in regions:
            dtype = _DTYPES[self._dtypes[region.role]]
            shape = (B, N, region.row_nbytes // dtype.itemsize)
            results[region.role] = self._scratch.empty(f"out {region.role}", shape, dtype)
        for matrices, rows in self._chunks(weight_BNK):
            chunk = {role: result[matrices, rows] for role, result in results.items()}
            self._codec.quantize(weight_BNK[matrices, rows], amax_B[matrices], chunk, self._scratch)
        for region in regions:
            offset = region.offset + batch.start * region.slab_nbytes
            offset += first_row * region.row_nbytes
            _write(out, offset, results[region.role])

    def _write_scalars(self, batch: Batch, amax_B: torch.Tensor, out: ShardWriter) -> None:
        """Write the parts that are one number for each matrix."""
        job = batch.job
        values = self._codec.weight_scales(amax_B)
        if job.input_amax is None:
            values["input_scale"] = torch.ones_like(amax_B)
        else:
            values["input_scale"] = self._codec.input_scale(torch.full_like(amax_B, job.input_amax))
        for region in job.regions:
            if not region.row_nbytes:
                each_part = values[region.role].repeat_interleave(len(job.rows))
                _write(out, region.offset + batch.start * region.slab_nbytes, each_part)

    def _refuse_not_finite(self, amax_B: torch.Tensor, job: Job, slabs: tuple[Slab, ...]) -> None:
        finite = torch.isfinite(amax_B)
        if bool(finite.all()):
            return
        slab = slabs[int(finite.logical_not().nonzero()[0])]
        for start, stop in self._row_pieces(job):
            rows = self._load(job, (slab,), start, stop)[0]
            found = torch.isfinite(rows).logical_not().nonzero()
            if len(found):
                n, k = (int(i) for i in found[0])
                value, row = float(rows[n, k]), start + n
                for read, label in zip(slab.reads, slab.labels, strict=True):
                    count = read.nbytes * job.slab_rows // job.slab_nbytes
                    if row < count:
                        raise CheckpointError(
                            f"{show(read.shard)}: {show(label)}: weight is {value} at row {row}, "
                            f"column {k}; weights that are NaN or infinite cannot be quantized"
                        )
                    row -= count
        raise AssertionError("amax was not finite, and every weight is")


def _write(out: ShardWriter, offset: int, values: torch.Tensor) -> None:
    flat = values.contiguous().view(-1).view(torch.uint8).cpu()
    out.write(offset, flat.numpy().data)
