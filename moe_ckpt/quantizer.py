"""Turn a batch of source slabs into output bytes: read, find amax, quantize, write.

The same code runs on a CPU and on CUDA. How slabs are cut into batches, pieces and chunks decides
the memory that is used, and no byte: amax is exact, and everything after it works on blocks that
no cut divides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import CheckpointError, show
from .formats import QuantFormat
from .formats.amax import abs_max
from .formats.scratch import Scratch
from .orientation import in_order, matrices_of
from .plan import Copy, Region
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
    """The buffers of one thread, and what it does with them.

    A slab larger than the stage is read in pieces: stored rows ``start`` to ``stop``, which are
    columns of the matrix if the source stores it transposed.
    """

    def __init__(
        self,
        reader: SourceReader,
        number_format: QuantFormat,
        device: torch.device,
        budget: Budget,
    ) -> None:
        self._reader = reader
        self._codec = number_format.codec()
        self._parts = {part.role: part for part in number_format.parts}
        self._k_multiple = number_format.k_multiple
        self._scratch = Scratch(device)
        self._device = device
        self._budget = budget
        self._stage = self._new_stage(budget.stage_nbytes)

    def copy(self, item: Copy, out: ShardWriter) -> int:
        """Copy bytes; returns how many were read."""
        buffer = self._stage.numpy().data
        if item.pair_nbytes:
            raw = torch.empty(item.read.nbytes, dtype=torch.uint8)
            self._reader.read(item.read, 0, raw.numpy().data)
            pairs = raw.view(-1, 2, item.pair_nbytes // 2)
            _write(out, item.offset, pairs.transpose(0, 1))
            return item.read.nbytes
        for start in range(0, item.read.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), item.read.nbytes - start)]
            self._reader.read(item.read, start, piece)
            out.write(item.offset + start, piece)
        return item.read.nbytes

    def amax(self, batch: Batch) -> float:
        """The largest magnitude in a batch of slabs that share it.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        amax_B = self._amax(self._load(batch, *piece) for piece in self._pieces(batch))
        self._refuse_not_finite(amax_B, batch)
        return float(amax_B.max())

    def quantize(self, batch: Batch, out: ShardWriter, amax: float | None = None) -> int:
        """Quantize a batch; returns the source bytes read, each counted once.

        ``amax`` is given for slabs that share it with others.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        pieces = list(self._pieces(batch))
        whole = self._load(batch, *pieces[0]) if len(pieces) == 1 else None
        if amax is None:
            loaded = [whole] if whole is not None else (self._load(batch, *p) for p in pieces)
            amax_B = self._amax(loaded)
            self._refuse_not_finite(amax_B, batch)
        else:
            amax_B = torch.full((batch.count,), amax, dtype=torch.float32, device=self._device)
        for piece in pieces:
            stored = whole if whole is not None else self._load(batch, *piece)
            self._write_piece(batch, piece, stored, amax_B, out)
        if not batch.job.is_stacked:
            self._write_scalars(batch, amax_B.repeat_interleave(len(batch.job.rows)), out)
        elif batch.start == 0:
            self._write_scalars(batch, amax_B[:1], out)
        return batch.nbytes

    def _pieces(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Ranges of stored rows that fit the stage; one if the batch does."""
        job = batch.job
        total, _ = job.stored_shape
        if batch.nbytes <= self._budget.stage_nbytes:
            yield 0, total
            return
        multiple = self._k_multiple if job.is_transposed else len(job.rows)
        step = self._budget.stage_nbytes // job.stored_row_nbytes // multiple * multiple
        for start in range(0, total, max(step, multiple)):
            yield start, min(start + max(step, multiple), total)

    def _load(self, batch: Batch, start: int, stop: int) -> torch.Tensor:
        """Stored rows ``start`` to ``stop`` of each slab, [B, rows, columns] on the device."""
        job = batch.job
        row_nbytes, columns = job.stored_row_nbytes, job.stored_shape[1]
        nbytes = (stop - start) * row_nbytes
        if batch.count * nbytes > self._stage.numel():
            self._stage = self._new_stage(batch.count * nbytes)
        buffer = self._stage.numpy().data
        for position, slab in enumerate(batch.slabs):
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
        staged = self._stage[: batch.count * nbytes].view(_DTYPES[job.dtype])
        return staged.view(batch.count, stop - start, columns).to(self._device)

    def _new_stage(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _amax(self, pieces: Iterator[torch.Tensor] | list[torch.Tensor]) -> torch.Tensor:
        """Largest magnitude of each slab, float32 [B], from all its pieces."""
        found = []
        for stored in pieces:
            rows = stored.flatten(0, 1)
            step = max(1, self._budget.chunk_items // rows.shape[1])
            chunks = [abs_max(chunk, self._scratch) for chunk in torch.split(rows, step)]
            found.append(torch.cat(chunks).view(stored.shape[:2]).amax(1))
        return torch.stack(found).amax(0)

    def _write_piece(
        self,
        batch: Batch,
        piece: tuple[int, int],
        stored: torch.Tensor,
        amax_B: torch.Tensor,
        out: ShardWriter,
    ) -> None:
        """Quantize a piece and write what it makes of every part that has rows.

        A piece of a transposed source that becomes rows is a part of every row: those are
        gathered, and written with the last piece.
        """
        job = batch.job
        weight_BPNK = matrices_of(job, stored)
        gathers = job.is_transposed and not job.is_stacked
        results = {}
        for region in job.regions:
            if region.row_nbytes:
                results[region.role] = self._result(region, batch, piece, weight_BPNK)
        for p in range(weight_BPNK.shape[1]):
            weight_BNK = weight_BPNK[:, p]
            for b, n in self._chunks(weight_BNK):
                chunk = weight_BNK[b, n]
                if not chunk.is_contiguous():
                    chunk = in_order(chunk, self._scratch)
                parts = {role: made[b, p, n] for role, (_, made) in results.items()}
                self._codec.quantize(chunk, amax_B[b], parts, self._scratch)
        start, stop = piece
        if gathers and stop < job.columns:
            return
        for region in job.regions:
            if not region.row_nbytes:
                continue
            buffer, _ = results[region.role]
            offset = region.offset + batch.start * region.slab_nbytes
            if job.is_stacked:
                row = start // self._parts[region.role].columns_per_item
                _write(out, offset + row * region.row_nbytes, buffer)
            elif gathers or stop - start == job.slab_rows:
                _write(out, offset, buffer)
            else:
                for p in range(buffer.shape[1]):
                    row = p * job.rows[0] + start // buffer.shape[1]
                    _write(out, offset + row * region.row_nbytes, buffer[:, p])

    def _result(
        self, region: Region, batch: Batch, piece: tuple[int, int], weight_BPNK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A buffer in the order of the output, and its view [B, P, N, items] for this piece."""
        part = self._parts[region.role]
        B, P, N, K = weight_BPNK.shape
        items = K // part.columns_per_item
        dtype, name = _DTYPES[part.dtype], f"out {region.role}"
        if batch.job.is_stacked:
            buffer = self._scratch.empty(name, (B, items, N), dtype)
            return buffer, buffer.transpose(1, 2).unsqueeze(1)
        if not batch.job.is_transposed:
            buffer = self._scratch.empty(name, (B, P, N, items), dtype)
            return buffer, buffer
        all_items = batch.job.columns // part.columns_per_item
        buffer = self._scratch.empty(name, (B, P, N, all_items), dtype)
        first = piece[0] // part.columns_per_item
        return buffer, buffer[..., first : first + items]

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

    def _write_scalars(self, batch: Batch, amax: torch.Tensor, out: ShardWriter) -> None:
        """Write the parts that are one number, for matrices with the given amax in order."""
        job = batch.job
        values = self._codec.weight_scales(amax)
        if job.input_amax is None:
            values["input_scale"] = torch.ones_like(amax)
        else:
            values["input_scale"] = self._codec.input_scale(torch.full_like(amax, job.input_amax))
        for region in job.regions:
            if not region.row_nbytes:
                offset = region.offset + batch.start * region.slab_nbytes
                _write(out, offset, values[region.role])

    def _refuse_not_finite(self, amax_B: torch.Tensor, batch: Batch) -> None:
        finite = torch.isfinite(amax_B)
        if bool(finite.all()):
            return
        job, slab = batch.job, batch.slabs[int(finite.logical_not().nonzero()[0])]
        columns, dtype = job.stored_shape[1], _DTYPES[job.dtype]
        step = max(1, self._stage.numel() // job.stored_row_nbytes)
        for read, label in zip(slab.reads, slab.labels, strict=True):
            rows = read.nbytes // job.stored_row_nbytes
            for start in range(0, rows, step):
                raw = torch.empty((min(step, rows - start), columns), dtype=dtype)
                into = raw.view(torch.uint8).flatten().numpy().data
                self._reader.read(read, start * job.stored_row_nbytes, into)
                found = torch.isfinite(raw).logical_not().nonzero()
                if len(found):
                    n, k = (int(i) for i in found[0])
                    raise CheckpointError(
                        f"{show(read.shard)}: {show(label)}: weight is {float(raw[n, k])} at row "
                        f"{start + n}, column {k}; weights that are NaN or infinite cannot be "
                        "quantized"
                    )
        raise AssertionError("amax was not finite, and every weight is")


def _write(out: ShardWriter, offset: int, values: torch.Tensor) -> None:
    flat = values.contiguous().view(-1).view(torch.uint8).cpu()
    out.write(offset, flat.numpy().data)
