"""Bring rows of source slabs onto the device: as they are stored, or decoded to numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import CheckpointError, show
from .formats import Part, e8m0, find_format
from .formats.scratch import Scratch
from .plan import Job
from .reader import SourceReader
from .schedule import Batch, Budget

__all__ = ["DTYPES", "Loader"]

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}

_BYTES_OF_POWERS = ("U8", "F8_E8M0")


class Loader:
    """The buffers that one thread reads into."""

    def __init__(self, reader: SourceReader, device: torch.device, budget: Budget) -> None:
        self._reader = reader
        self._device = device
        self._budget = budget
        self._stages: dict[str, torch.Tensor] = {}
        self._scratch = Scratch(device)

    def stage(self, name: str, nbytes: int) -> torch.Tensor:
        """A buffer on the host, uint8 [nbytes]; the one of this name before is overwritten."""
        found = self._stages.get(name)
        if found is None or found.numel() < nbytes:
            size = max(nbytes, self._budget.stage_nbytes if name == "weights" else 0)
            pinned = self._device.type == "cuda"
            found = self._stages[name] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return found[:nbytes]

    def weights(self, batch: Batch, start: int, stop: int) -> torch.Tensor:
        """Stored rows ``start`` to ``stop`` of each slab as numbers, [B, rows, columns].

        Weights that are not quantized keep their dtype, others become float32.
        """
        job = batch.job
        if job.encoded.is_plain:
            return self._rows(batch, start, stop)
        K = job.columns
        out = self._scratch.empty("decoded", (batch.count, stop - start, K), torch.float32)
        step = job.encoded.row_step
        rows = max(1, self._budget.chunk_items // (batch.count * K) // step) * step
        at = 0
        for r, first, last in self._members(job, start, stop):
            scalars = self._scalars_of(batch, r)
            # Items of a part may cover several rows: begin with a whole item, and drop the rest.
            for aligned in range(first // step * step, last, rows):
                end = min(aligned + rows, last)
                parts = {
                    part.role: self._part(batch, r, part, aligned, end)
                    for part in job.encoded.parts
                    if not part.is_scalar
                }
                codec = find_format(job.encoded.format).codec()
                decoded = codec.dequantize(parts | scalars)[:, max(first - aligned, 0) :]
                out[:, at : at + decoded.shape[1]] = decoded
                at += decoded.shape[1]
        return out

    def parts(self, batch: Batch, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Stored rows ``start`` to ``stop`` of each part that has rows, [B, rows, items].

        ``start`` begins a whole item of every part, in every source tensor.

        Raises:
            CheckpointError: a weight or a scale is no number.
        """
        job = batch.job
        found = {}
        for part in job.encoded.parts:
            if part.is_scalar:
                continue
            if job.encoded.is_plain:
                found[part.role] = self._rows(batch, start, stop)
                continue
            pieces = []
            for r, first, last in self._members(job, start, stop):
                pieces.append(self._part(batch, r, part, first, last))
                if part.dtype == "F8_E4M3" and part.role == "qweight" and _has_nan(pieces[-1]):
                    _refuse(pieces[-1].isnan(), batch, r, "weight", pieces[-1], first)
            found[part.role] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return found

    def scalars(self, batch: Batch, role: str) -> torch.Tensor:
        """A scalar part of every source tensor of every slab, float32 [B, R] on the host.

        Raises:
            CheckpointError: one is not a finite number above 0.
        """
        members = len(batch.slabs[0].reads)
        index, part = next((i, p) for i, p in enumerate(batch.job.encoded.parts) if p.role == role)
        itemsize = DTYPES[part.dtype].itemsize
        raw = torch.empty(batch.count * members * itemsize, dtype=torch.uint8)
        view = raw.numpy().data
        at = 0
        for slab in batch.slabs:
            for reads in slab.reads:
                self._reader.read(reads[index], 0, view[at : at + itemsize])
                at += itemsize
        found = raw.view(DTYPES[part.dtype]).view(batch.count, members).float()
        for b, r in (~(torch.isfinite(found) & (found > 0))).nonzero().tolist():
            raise CheckpointError(
                f"{show(batch.slabs[b].labels[r])}: its {role} is {float(found[b, r])}; expected a "
                "finite number above 0"
            )
        return found

    def _scalars_of(self, batch: Batch, r: int) -> dict[str, torch.Tensor]:
        """What a codec needs beside the parts with rows, for source tensor ``r``: [B] each."""
        encoded = batch.job.encoded
        found = {}
        for part in encoded.parts:
            if part.is_scalar and part.role != "input_scale":
                inverse = part.role in encoded.inverse
                role = part.role.replace("scale", "divisor") if inverse else part.role
                found[role] = self.scalars(batch, part.role)[:, r].to(self._device)
        return found

    def _members(self, job: Job, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The source tensors that hold rows ``start`` to ``stop`` of a slab, and their own rows."""
        before = 0
        for r, count in enumerate(job.source_rows):
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                yield r, first, last
            before += count

    def _part(self, batch: Batch, r: int, part: Part, start: int, stop: int) -> torch.Tensor:
        """The items of a part for rows ``start`` to ``stop`` of source tensor ``r``."""
        job = batch.job
        index = job.encoded.parts.index(part)
        first, last = start // part.rows, -(-stop // part.rows)
        row_nbytes = part.row_nbytes(job.columns)
        nbytes = (last - first) * row_nbytes
        stage = self.stage(part.role, batch.count * nbytes)
        view = stage.numpy().data
        for b, slab in enumerate(batch.slabs):
            into = view[b * nbytes : (b + 1) * nbytes]
            self._reader.read(slab.reads[r][index], first * row_nbytes, into)
        typed = stage.view(DTYPES[part.dtype]).view(batch.count, last - first, -1)
        moved = typed.to(self._device, copy=True)
        if part.role != "qweight":
            self._check_scales(batch, r, part, moved, first)
        if part.dtype == "F8_E8M0" and not job.encoded.format.startswith("mx"):
            return e8m0.decode(moved)
        return moved

    def _check_scales(
        self, batch: Batch, r: int, part: Part, scales: torch.Tensor, first: int
    ) -> None:
        """Refuse NaN, infinite and negative scales; zero is what some write for zeros."""
        if part.dtype in _BYTES_OF_POWERS:
            _refuse(scales == 255, batch, r, part.role, e8m0.decode(scales), first)
        else:
            values = scales.float()
            _refuse(~(torch.isfinite(values) & (values >= 0)), batch, r, part.role, values, first)

    def _rows(self, batch: Batch, start: int, stop: int) -> torch.Tensor:
        """Stored rows of weights that are not quantized, whatever their orientation."""
        job = batch.job
        row_nbytes, columns = job.stored_row_nbytes, job.stored_shape[1]
        nbytes = (stop - start) * row_nbytes
        buffer = self.stage("weights", batch.count * nbytes)
        view = buffer.numpy().data
        for position, slab in enumerate(batch.slabs):
            into = view[position * nbytes : (position + 1) * nbytes]
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
        typed = buffer.view(DTYPES[job.dtype])
        return typed.view(batch.count, stop - start, columns).to(self._device)


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether E4M3 codes hold 0x7F or 0xFF; 20 times faster than to ask torch."""
    return int((codes.view(torch.uint8) & 0x7F).amax()) == 0x7F


def _refuse(
    bad: torch.Tensor, batch: Batch, r: int, role: str, values: torch.Tensor, first: int
) -> None:
    """Raise for the first bad item of [B, rows, items], rows counted from ``first``."""
    if not bool(bad.any()):
        return
    b, row, column = bad.nonzero()[0].tolist()
    slab, value = batch.slabs[b], float(values[b, row, column])
    raise CheckpointError(
        f"{show(slab.reads[r][0].shard)}: {show(slab.labels[r])}: {role} is {value} at row "
        f"{first + row}, column {column}; expected a finite number"
        f"{'' if role == 'weight' else ', 0 or above'}"
    )
