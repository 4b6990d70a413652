"""Turn a batch of source slabs into output bytes: read, find amax, quantize or recode, write.

The same code runs on a CPU and on CUDA. How slabs are cut into batches, pieces and chunks decides
the memory that is used, and no byte: amax is exact, and everything after it works on blocks that
no cut divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import lcm

import torch

from .errors import CheckpointError, show
from .formats import Codec, QuantFormat, find_format, nvfp4_from_mxfp4
from .formats.amax import abs_max
from .formats.scratch import Scratch
from .loader import DTYPES, Loader
from .orientation import in_order, matrices_of
from .plan import Copy, Job, Region
from .reader import SourceReader
from .schedule import Batch, Budget
from .writer import ShardWriter

__all__ = ["Worker"]

# Fills the parts of a chunk: of which matrix in a slab, its slices of B, N and K, parts by role.
Fill = Callable[[int, slice, slice, slice, dict[str, torch.Tensor]], None]


class Worker:
    """The buffers of one thread, and what it does with them.

    A slab larger than the stage is read in pieces: stored rows ``start`` to ``stop``, which are
    columns of the matrix if the source stores it transposed.

    ``inexact_blocks`` counts blocks of MXFP4 that NVFP4 could not hold exactly.
    """

    def __init__(self, reader: SourceReader, device: torch.device, budget: Budget) -> None:
        self._reader = reader
        self._loader = Loader(reader, device, budget)
        self._scratch = Scratch(device)
        self._device = device
        self._budget = budget
        self.inexact_blocks = 0

    def copy(self, item: Copy, out: ShardWriter) -> int:
        """Copy bytes; returns how many were read."""
        buffer = self._loader.stage("weights", self._budget.stage_nbytes).numpy().data
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

    def amax(self, batch: Batch) -> list[float]:
        """The largest magnitude of each slab; of MXFP4 that is recoded, its largest exponent.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        if _is_cast(batch.job):
            return self._max_exponent(batch).float().tolist()
        rows = self._amax_of_rows(batch, self._pieces(batch))
        self._refuse_not_finite(rows, batch)
        found: list[float] = rows.amax(1).tolist()
        return found

    def convert(self, batch: Batch, out: ShardWriter, shared: float | None = None) -> int:
        """Write all output of a batch; returns the source bytes it stands for.

        ``shared`` is the amax (or exponent) of slabs that share it with others.

        Raises:
            CheckpointError: a weight is NaN or infinite, or scales contradict each other.
        """
        if not batch.job.is_recoded:
            self._quantize(batch, out, shared)
        elif _is_cast(batch.job):
            self._cast(batch, out, shared)
        else:
            self._move(batch, out)
        return sum(r.nbytes for slab in batch.slabs for reads in slab.reads for r in reads)

    def _quantize(self, batch: Batch, out: ShardWriter, shared: float | None) -> None:
        job, target = batch.job, find_format(batch.job.format)
        codec = target.codec()
        pieces = list(self._pieces(batch))
        whole = self._loader.weights(batch, *pieces[0]) if len(pieces) == 1 else None
        known = [shared if shared is not None else slab.amax for slab in batch.slabs]
        if None in known or target.amax_of_rows:
            rows = self._amax_of_rows(batch, iter(pieces), whole)
            self._refuse_not_finite(rows, batch)
            amax_B = rows.amax(1)
        else:
            amax_B = torch.tensor(known, dtype=torch.float32, device=self._device)
        for piece in pieces:
            stored = whole if whole is not None else self._loader.weights(batch, *piece)
            weight_BPNK = matrices_of(job, stored)
            rows_BPN = _rows_of_piece(job, rows, piece) if target.amax_of_rows else None

            def fill(
                p: int,
                b: slice,
                n: slice,
                k: slice,
                out: dict[str, torch.Tensor],
                weight_BPNK: torch.Tensor = weight_BPNK,
                rows_BPN: torch.Tensor | None = rows_BPN,
            ) -> None:
                chunk = weight_BPNK[b, p, n, k]
                if not chunk.is_contiguous():
                    chunk = in_order(chunk, self._scratch)
                amax = amax_B[b] if rows_BPN is None else rows_BPN[b, p, n]
                codec.quantize(chunk, amax, out, self._scratch)

            self._write_piece(batch, piece, tuple(weight_BPNK.shape), fill, out)
        scalars = codec.weight_scales(amax_B)
        values = {
            role: value.view(-1, 1).expand(-1, len(job.rows)) for role, value in scalars.items()
        }
        self._write_scalars(batch, values, out)

    def _move(self, batch: Batch, out: ShardWriter) -> None:
        """Parts as they are, under other names and in another order."""
        job = batch.job
        for piece in self._pieces(batch):
            stored = self._loader.parts(batch, *piece)
            if job.encoded.is_plain:
                rows = self._amax_of_rows(batch, iter([piece]), stored["qweight"])
                self._refuse_not_finite(rows, batch)
            views = {role: matrices_of(job, tensor) for role, tensor in stored.items()}

            def fill(
                p: int,
                b: slice,
                n: slice,
                k: slice,
                out: dict[str, torch.Tensor],
                views: dict[str, torch.Tensor] = views,
            ) -> None:
                for part in job.parts:
                    if not part.is_scalar:
                        rows = slice(n.start // part.rows, -(-n.stop // part.rows))
                        items = slice(k.start // part.columns, -(-k.stop // part.columns))
                        out[part.role].copy_(views[part.role][b, p, rows, items])

            B, P, N, _ = views["qweight"].shape
            columns = job.columns if not job.is_transposed else piece[1] - piece[0]
            self._write_piece(batch, piece, (B, P, N, columns), fill, out)
        scalars = {
            part.role: self._stored_scalars(batch, part.role)
            for part in job.parts
            if part.is_scalar and part.role != "input_scale"
        }
        self._write_scalars(batch, scalars, out)

    def _cast(self, batch: Batch, out: ShardWriter, shared: float | None) -> None:
        """MXFP4 as NVFP4: the same codes under other scales."""
        job = batch.job
        if shared is None:
            exponent_B = self._max_exponent(batch)
        else:
            exponent_B = torch.full((batch.count,), int(shared), device=self._device)
        exponent_B = exponent_B.int()
        for piece in self._pieces(batch):
            views = {r: matrices_of(job, t) for r, t in self._loader.parts(batch, *piece).items()}

            def fill(
                p: int,
                b: slice,
                n: slice,
                k: slice,
                out: dict[str, torch.Tensor],
                views: dict[str, torch.Tensor] = views,
            ) -> None:
                parts = {
                    part.role: views[part.role][
                        b, p, n, k.start // part.columns : k.stop // part.columns
                    ].contiguous()
                    for part in job.encoded.parts
                }
                _, inexact = nvfp4_from_mxfp4.cast(parts, exponent_B[b], out, self._scratch)
                self.inexact_blocks += inexact

            B, P, N, _ = views["qweight"].shape
            self._write_piece(batch, piece, (B, P, N, job.columns), fill, out)
        scale = nvfp4_from_mxfp4.global_scale(exponent_B)
        self._write_scalars(
            batch, {"global_scale": scale.view(-1, 1).expand(-1, len(job.rows))}, out
        )

    def _max_exponent(self, batch: Batch) -> torch.Tensor:
        """The largest exponent of each slab's blocks, int32 [B]."""
        found = [
            nvfp4_from_mxfp4.max_exponent(self._loader.parts(batch, *piece))
            for piece in self._pieces(batch)
        ]
        return torch.stack(found).amax(0)

    def _pieces(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Ranges of stored rows that fit the stage; one if the batch does."""
        job = batch.job
        target = find_format(job.format)
        total, _ = job.stored_shape
        if batch.nbytes <= self._budget.stage_nbytes:
            yield 0, total
            return
        if job.is_transposed:
            multiple = target.k_multiple
        else:
            multiple = lcm(target.row_step, job.encoded.row_step) * (1 + job.is_interleaved)
        step = self._budget.stage_nbytes // job.stored_row_nbytes // multiple * multiple
        for start in range(0, total, max(step, multiple)):
            yield start, min(start + max(step, multiple), total)

    def _amax_of_rows(
        self, batch: Batch, pieces: Iterator[tuple[int, int]], whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Largest magnitude of each row of the slabs, float32 [B, N]."""
        found = []
        for piece in pieces:
            stored = whole if whole is not None else self._loader.weights(batch, *piece)
            rows = stored.flatten(0, 1)
            step = max(1, self._budget.chunk_items // rows.shape[1])
            if batch.job.is_transposed:
                step = max(1, self._budget.chunk_items // (rows.shape[1] * stored.shape[0]))
                chunks = [
                    abs_max(chunk, self._scratch, dim=1) for chunk in torch.split(stored, step, 1)
                ]
                found.append(torch.stack(chunks).amax(0))
            else:
                chunks = [abs_max(chunk, self._scratch) for chunk in torch.split(rows, step)]
                found.append(torch.cat(chunks).view(stored.shape[:2]))
        return torch.stack(found).amax(0) if batch.job.is_transposed else torch.cat(found, 1)

    def _write_piece(
        self,
        batch: Batch,
        piece: tuple[int, int],
        shape: tuple[int, ...],
        fill: Fill,
        out: ShardWriter,
    ) -> None:
        """Fill buffers for a piece of shape [B, P, N, K], and write every part that has rows.

        A piece that is a part of every output row is gathered, and written with the last piece.
        """
        job = batch.job
        parts = {part.role: part for part in job.parts}
        gathers = job.is_transposed != job.is_stacked
        results = {
            region.role: self._result(region, batch, piece, shape)
            for region in job.regions
            if region.row_nbytes
        }
        for p in range(shape[1]):
            for b, n, k in self._chunks(job, shape):
                views = {}
                for role, (_, made) in results.items():
                    part = parts[role]
                    rows = slice(n.start // part.rows, -(-n.stop // part.rows))
                    items = slice(k.start // part.columns, -(-k.stop // part.columns))
                    views[role] = made[b, p, rows, items]
                fill(p, b, n, k, views)
        start, stop = piece
        if gathers and stop < job.stored_shape[0]:
            return
        for region in job.regions:
            if not region.row_nbytes:
                continue
            part, (buffer, _) = parts[region.role], results[region.role]
            offset = region.offset + batch.start * region.slab_nbytes
            if gathers or stop - start == job.stored_shape[0]:
                _write(out, offset, buffer)
            elif job.is_stacked:
                _write(out, offset + start // part.columns * region.row_nbytes, buffer)
            else:
                for p in range(buffer.shape[1]):
                    row = (p * job.rows[0] + start // buffer.shape[1]) // part.rows
                    _write(out, offset + row * region.row_nbytes, buffer[:, p])

    def _result(
        self, region: Region, batch: Batch, piece: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A buffer in the order of the output, and its view [B, P, N, items] for this piece."""
        job = batch.job
        part = next(part for part in job.parts if part.role == region.role)
        B, P, N, K = shape
        dtype, name = DTYPES[part.dtype], f"out {region.role}"
        gathers = job.is_transposed != job.is_stacked
        rows, items = part.shape(N, K)
        if not gathers:
            if job.is_stacked:
                buffer = self._scratch.empty(name, (B, items, rows), dtype)
                return buffer, buffer.transpose(1, 2).unsqueeze(1)
            buffer = self._scratch.empty(name, (B, P, rows, items), dtype)
            return buffer, buffer
        if job.is_stacked:  # a piece is rows, and becomes columns
            buffer = self._scratch.empty(name, (B, items, job.slab_rows), dtype)
            return buffer, buffer.transpose(1, 2).unsqueeze(1)[:, :, piece[0] : piece[1]]
        all_items = part.shape(N, job.columns)[1]
        buffer = self._scratch.empty(name, (B, P, rows, all_items), dtype)
        first = piece[0] // part.columns
        return buffer, buffer[..., first : first + items]

    def _chunks(self, job: Job, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of matrices, of rows of one, or of columns, of about ``chunk_items`` weights."""
        B, _, N, K = shape
        target = find_format(job.format)
        # A recoded matrix is cut where neither format has a block.
        multiple = target.k_multiple
        if job.is_recoded:
            multiple = lcm(multiple, find_format(job.encoded.format).k_multiple)
        matrices = self._budget.chunk_items // (N * K)
        if matrices:
            for b in range(0, B, matrices):
                yield slice(b, min(b + matrices, B)), slice(0, N), slice(0, K)
            return
        step = target.row_step
        rows = max(1, self._budget.chunk_items // K // step) * step
        columns = K
        if rows * K > 2 * self._budget.chunk_items and not target.amax_of_rows:
            columns = max(1, self._budget.chunk_items // rows // multiple) * multiple
        for b in range(B):
            for n in range(0, N, rows):
                for k in range(0, K, columns):
                    yield slice(b, b + 1), slice(n, min(n + rows, N)), slice(k, min(k + columns, K))

    def _write_scalars(
        self, batch: Batch, values: Mapping[str, torch.Tensor], out: ShardWriter
    ) -> None:
        """Write the parts that are one number, given as they multiply: [B, P] by role."""
        job = batch.job
        if job.is_stacked and batch.start > 0:
            return
        for region in job.regions:
            if region.row_nbytes:
                continue
            value = values.get(region.role)
            if region.role == "input_scale":
                value = self._input_scale(batch, find_format(job.format))
            assert value is not None
            if job.is_stacked:
                value = value[:1, :1]
            if region.role in job.inverse:
                value = torch.ones_like(value) / value
            _write(out, region.offset + batch.start * region.slab_nbytes, value.float())

    def _input_scale(self, batch: Batch, target: QuantFormat) -> torch.Tensor:
        job = batch.job
        shape = (batch.count, len(job.rows))
        if job.input_amax is not None:
            codec: Codec = target.codec()
            return codec.input_scale(torch.full((1,), job.input_amax)).expand(shape)
        if job.is_recoded and job.encoded.has_input_scale:
            return self._stored_scalars(batch, "input_scale")
        return torch.ones(shape)

    def _stored_scalars(self, batch: Batch, role: str) -> torch.Tensor:
        """A scalar of the source for every output matrix, as it multiplies: float64 [B, P]."""
        job = batch.job
        found = self._loader.scalars(batch, role)
        must_agree = role == "global_scale" and job.format.startswith("nvfp4")
        for b in (found != found[:, :1]).any(1).nonzero().flatten().tolist() if must_agree else ():
            raise CheckpointError(
                f"{show(batch.slabs[b].labels[0])} and {show(batch.slabs[b].labels[-1])}: have "
                f"different global scales, {' and '.join(map(str, found[b].tolist()))}, and "
                "runtimes use one for both; convert with --format bf16 first, then again"
            )
        found = found.double()  # the reciprocal of a reciprocal is the number again
        if role in job.encoded.inverse:
            found = torch.ones_like(found) / found
        return found.expand(batch.count, len(job.rows))

    def _refuse_not_finite(self, rows: torch.Tensor, batch: Batch) -> None:
        """Raise if the largest magnitude of a row, [B, N], is not a number."""
        if bool(torch.isfinite(rows).all()):
            return
        job = batch.job
        b = int(torch.isfinite(rows).all(1).logical_not().nonzero()[0])
        one = Batch(job, batch.start + b, batch.start + b + 1)
        for start, stop in self._pieces(one):
            found = torch.isfinite(self._loader.weights(one, start, stop)[0]).logical_not()
            if bool(found.any()):
                stored, column = (int(i) for i in found.nonzero()[0])
                member, row = self._member_of(job, start + stored)
                value = float(self._loader.weights(one, start, stop)[0, stored, column])
                slab = one.slabs[0]
                raise CheckpointError(
                    f"{show(slab.reads[member][0].shard)}: {show(slab.labels[member])}: weight is "
                    f"{value} at row {row}, column {column}; weights that are NaN or infinite "
                    "cannot be quantized"
                )
        raise AssertionError("amax was not finite, and every weight is")

    def _member_of(self, job: Job, row: int) -> tuple[int, int]:
        """Which source tensor holds a stored row of a slab, and which of its rows that is."""
        if job.is_transposed:
            return 0, row
        for member, count in enumerate(job.source_rows):
            if row < count:
                return member, row
            row -= count
        raise AssertionError("row is beyond the slab")


def _is_cast(job: Job) -> bool:
    return job.is_recoded and job.encoded.format == "mxfp4" and job.format != "mxfp4"


def _rows_of_piece(job: Job, rows: torch.Tensor, piece: tuple[int, int]) -> torch.Tensor:
    """Of the amax of rows [B, N], those of a piece, [B, P, N]."""
    B = rows.shape[0]
    if not job.is_transposed:
        rows = rows[:, piece[0] : piece[1]]
    if job.is_interleaved:
        return rows.view(B, -1, 2).transpose(1, 2)
    return rows.view(B, 1, -1)


def _write(out: ShardWriter, offset: int, values: torch.Tensor) -> None:
    flat = values.contiguous().view(-1).view(torch.uint8).cpu()
    out.write(offset, flat.numpy().data)
