"""Turn a batch of source slabs into output bytes: read, find amax, quantize or recode, write.

The same code runs on a CPU and on CUDA. How slabs are cut into batches, pieces and chunks decides
the memory that is used, and no byte: amax is exact, and everything after it works on blocks that
no cut divides.
"""

from __future__ import annotations

import torch

from .formats import find_format, nvfp4_from_mxfp4
from .formats.scratch import Scratch
from .loader import Loader
from .magnitudes import Magnitudes, rows_of_piece
from .orientation import in_order, matrices_of
from .pieces import PieceWriter, cut, write
from .plan import Copy, Job
from .reader import SourceReader
from .scalars import stored_scalars, write_scalars
from .schedule import Batch, Budget
from .writer import ShardWriter

__all__ = ["Worker"]


class Worker:
    """The buffers of one thread, and what it does with them.

    ``inexact_blocks`` counts blocks of MXFP4 that NVFP4 could not hold exactly.
    """

    def __init__(self, reader: SourceReader, device: torch.device, budget: Budget) -> None:
        self._reader = reader
        self._device = device
        self._budget = budget
        self._scratch = Scratch(device)
        self._loader = Loader(reader, device, budget)
        self._magnitudes = Magnitudes(self._loader, self._scratch, budget)
        self._pieces = PieceWriter(self._scratch, budget)
        self.inexact_blocks = 0

    def copy(self, item: Copy, out: ShardWriter) -> int:
        """Copy bytes; returns how many were read."""
        if item.pair_nbytes:
            raw = torch.empty(item.read.nbytes, dtype=torch.uint8)
            self._reader.read(item.read, 0, raw.numpy().data)
            pairs = raw.view(-1, 2, item.pair_nbytes // 2)
            write(out, item.offset, pairs.transpose(0, 1))
            return item.read.nbytes
        buffer = self._loader.stage("weights", self._budget.stage_nbytes).numpy().data
        for start in range(0, item.read.nbytes, len(buffer)):
            piece = buffer[: min(len(buffer), item.read.nbytes - start)]
            self._reader.read(item.read, start, piece)
            out.write(item.offset + start, piece)
        return item.read.nbytes

    def amax(self, batch: Batch) -> list[float]:
        """The largest magnitude of each slab; of MXFP4 that is cast, its largest exponent.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        if _is_cast(batch.job):
            exponents: list[float] = self._max_exponent(batch).float().tolist()
            return exponents
        rows = self._magnitudes.of_rows(batch, cut(batch, self._budget))
        found: list[float] = rows.amax(1).tolist()
        return found

    def convert(self, batch: Batch, out: ShardWriter, shared: float | None = None) -> int:
        """Write all output of a batch; returns the source bytes it was made of.

        ``shared`` is what `amax` found, of slabs that share it with others.

        Raises:
            CheckpointError: a weight is NaN or infinite, or scales contradict each other.
        """
        if not batch.job.is_recoded:
            scalars = self._quantize(batch, out, shared)
        elif _is_cast(batch.job):
            scalars = self._cast(batch, out, shared)
        else:
            scalars = self._move(batch, out)
        write_scalars(batch, scalars, self._loader, out)
        return sum(read.nbytes for slab in batch.slabs for reads in slab.reads for read in reads)

    def _quantize(
        self, batch: Batch, out: ShardWriter, shared: float | None
    ) -> dict[str, torch.Tensor]:
        """Round weights to the parts of a format; returns its scalars."""
        job, target = batch.job, find_format(batch.job.format)
        codec = target.codec()
        pieces = cut(batch, self._budget)
        whole = self._loader.weights(batch, *pieces[0]) if len(pieces) == 1 else None
        known = [shared if shared is not None else slab.amax for slab in batch.slabs]
        if None in known or target.amax_of_rows:
            amax_BN = self._magnitudes.of_rows(batch, pieces, whole)
            amax_B = amax_BN.amax(1)
        else:
            amax_B = torch.tensor(known, dtype=torch.float32, device=self._device)
        for piece in pieces:
            stored = whole if whole is not None else self._loader.weights(batch, *piece)
            weight_BPNK = matrices_of(job, stored)
            amax_BPN = rows_of_piece(job, amax_BN, piece) if target.amax_of_rows else None
            for chunk in self._pieces.chunks(batch, piece, tuple(weight_BPNK.shape), out):
                weight_BNK = weight_BPNK[chunk.b, chunk.p, chunk.n, chunk.k]
                if not weight_BNK.is_contiguous():
                    weight_BNK = in_order(weight_BNK, self._scratch)
                amax = amax_B[chunk.b] if amax_BPN is None else amax_BPN[chunk.b, chunk.p, chunk.n]
                codec.quantize(weight_BNK, amax, chunk.out, self._scratch)
        return codec.weight_scales(amax_B)

    def _move(self, batch: Batch, out: ShardWriter) -> dict[str, torch.Tensor]:
        """Parts as they are, under other names and in another order; returns the scalars."""
        job = batch.job
        for piece in cut(batch, self._budget):
            stored = self._loader.parts(batch, *piece)
            if job.encoded.is_plain:
                self._magnitudes.of_rows(batch, [piece], stored["qweight"])
            views = {role: matrices_of(job, tensor) for role, tensor in stored.items()}
            columns = piece[1] - piece[0] if job.is_transposed else job.columns
            shape = (*views["qweight"].shape[:3], columns)
            for chunk in self._pieces.chunks(batch, piece, shape, out):
                for part in job.parts:
                    if not part.is_scalar:
                        chunk.out[part.role].copy_(views[part.role][chunk.of(part)])
        roles = [part.role for part in job.parts if part.is_scalar and part.role != "input_scale"]
        return {role: stored_scalars(batch, role, self._loader) for role in roles}

    def _cast(
        self, batch: Batch, out: ShardWriter, shared: float | None
    ) -> dict[str, torch.Tensor]:
        """MXFP4 as NVFP4: the same codes under other scales; returns the global ones."""
        job = batch.job
        if shared is None:
            exponent_B = self._max_exponent(batch)
        else:
            exponent_B = torch.full((batch.count,), int(shared), device=self._device)
        exponent_B = exponent_B.int()
        for piece in cut(batch, self._budget):
            views = {r: matrices_of(job, t) for r, t in self._loader.parts(batch, *piece).items()}
            shape = (*views["qweight"].shape[:3], job.columns)
            for chunk in self._pieces.chunks(batch, piece, shape, out):
                parts = {
                    part.role: views[part.role][chunk.of(part)].contiguous()
                    for part in job.encoded.parts
                }
                _, inexact = nvfp4_from_mxfp4.cast(
                    parts, exponent_B[chunk.b], chunk.out, self._scratch
                )
                self.inexact_blocks += inexact
        return {"global_scale": nvfp4_from_mxfp4.global_scale(exponent_B)}

    def _max_exponent(self, batch: Batch) -> torch.Tensor:
        """The largest exponent of each slab's blocks, int32 [B]."""
        found = [
            nvfp4_from_mxfp4.max_exponent(self._loader.parts(batch, *piece))
            for piece in cut(batch, self._budget)
        ]
        return torch.stack(found).amax(0)


def _is_cast(job: Job) -> bool:
    return job.is_recoded and job.encoded.format == "mxfp4" and job.format != "mxfp4"
