"""Pack outputs into shards, and give every tensor its position.

A unit is what must not be torn apart: a copied tensor, linear layers that share an amax, or one
expert. The experts of a layer are one unit that may be cut between experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..dialects import Dialect
from ..dtypes import nbytes_of
from ..formats import Part
from ..plan import Constant, Copy, Job, OutShard, OutTensor, Region, by_alignment
from ..source.checkpoint import SINGLE
from ..source.stored import Read
from ..texts import header_of

__all__ = ["ConstantUnit", "CopyUnit", "QuantUnit", "Unit", "pack", "shard_of"]

# Readers refuse headers over 100 MB; an entry is its name and at most this much more.
HEADER_CAP_NBYTES = 90_000_000
_ENTRY_NBYTES = 120


@dataclass(frozen=True, slots=True)
class CopyUnit:
    """A source range that is copied, and the output tensors it holds one after another."""

    source: str
    read: Read
    tensors: tuple[OutTensor, ...]
    reason: str
    pair_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class ConstantUnit:
    """An output tensor whose bytes the plan decides."""

    tensor: OutTensor
    data: bytes


@dataclass(frozen=True, slots=True)
class QuantUnit:
    """Jobs whose slabs go together: slab i of each lands in one shard."""

    jobs: tuple[Job, ...]

    @property
    def count(self) -> int:
        """How many pieces the unit may be cut into."""
        first = self.jobs[0]
        return 1 if first.is_stacked else len(first.outputs)


Unit = CopyUnit | ConstantUnit | QuantUnit


@dataclass(slots=True)
class _Run:
    """Output tensors of one dtype that lie one after another."""

    tensors: Sequence[OutTensor]
    nbytes: int
    offset: int = 0


@dataclass(slots=True)
class _Bin:
    """A shard while it is filled."""

    nbytes: int = 0
    header_nbytes: int = 0
    copies: list[CopyUnit] = field(default_factory=list)
    constants: list[ConstantUnit] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


def pack(units: Iterable[Unit], dialect: Dialect, max_nbytes: int) -> list[OutShard]:
    """Fill shards in order, each with at most ``max_nbytes`` of tensors.

    A single piece that is larger gets a shard of its own.
    """
    bins = [_Bin()]

    def room_for(nbytes: int, header_nbytes: int) -> _Bin:
        last = bins[-1]
        full = last.nbytes + nbytes > max_nbytes
        full = full or last.header_nbytes + header_nbytes > HEADER_CAP_NBYTES
        if full and last.header_nbytes:
            bins.append(_Bin())
        return bins[-1]

    for unit in units:
        if isinstance(unit, CopyUnit):
            header_nbytes = sum(len(t.name.encode()) + _ENTRY_NBYTES for t in unit.tensors)
            into = room_for(unit.read.nbytes, header_nbytes)
            into.copies.append(unit)
            into.nbytes += unit.read.nbytes
            into.header_nbytes += header_nbytes
            continue
        if isinstance(unit, ConstantUnit):
            header_nbytes = len(unit.tensor.name.encode()) + _ENTRY_NBYTES
            into = room_for(len(unit.data), header_nbytes)
            into.constants.append(unit)
            into.nbytes += len(unit.data)
            into.header_nbytes += header_nbytes
            continue
        done = 0
        nbytes, header_nbytes = _piece_nbytes(unit, dialect)
        while done < unit.count:
            into = room_for(nbytes, header_nbytes)
            fits = min(
                (max_nbytes - into.nbytes) // max(nbytes, 1),
                (HEADER_CAP_NBYTES - into.header_nbytes) // header_nbytes,
            )
            count = min(max(fits, 1), unit.count - done)
            into.jobs += (job.cut(done, done + count) for job in unit.jobs)
            into.nbytes += nbytes * count
            into.header_nbytes += header_nbytes * count
            done += count
    names = _shard_names(len(bins))
    return [_place(name, filled, dialect) for name, filled in zip(names, bins, strict=True)]


def shard_of(name: str, units: Iterable[Unit], dialect: Dialect) -> OutShard:
    """One shard of all these units, however large they are."""
    filled = _Bin()
    for unit in units:
        if isinstance(unit, CopyUnit):
            filled.copies.append(unit)
        elif isinstance(unit, ConstantUnit):
            filled.constants.append(unit)
        else:
            filled.jobs += unit.jobs
    return _place(name, filled, dialect)


def _piece_nbytes(unit: QuantUnit, dialect: Dialect) -> tuple[int, int]:
    """Output bytes and header bytes of one piece: a slab of each job, or all of a stack."""
    nbytes = header_nbytes = 0
    for job in unit.jobs:
        slabs = len(job.outputs) if job.is_stacked else 1
        tensors = len(job.parts)
        for part in job.parts:
            nbytes += slabs * _slab_nbytes(job, part)
        if dialect.spellings[job.format].shape_suffix:
            nbytes += 2 * 8 * len(job.place.rows)
            tensors += 1
        longest = max(len(name.encode()) for made in job.outputs for name in made.modules)
        header_nbytes += len(job.place.rows) * tensors * (longest + _ENTRY_NBYTES)
    return nbytes, header_nbytes


def _slab_nbytes(job: Job, part: Part) -> int:
    columns = job.place.columns
    return sum(nbytes_of(part.dtype, part.shape(n, columns)) for n in job.place.rows)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _place(name: str, filled: _Bin, dialect: Dialect) -> OutShard:
    """Order the tensors of a shard and compute all offsets."""
    copies = [_Run(unit.tensors, unit.read.nbytes) for unit in filled.copies]
    shapes = [unit for job in filled.jobs for unit in _shapes(job, dialect)]
    fixed = [*filled.constants, *shapes]
    constants = [_Run([unit.tensor], len(unit.data)) for unit in fixed]
    regions = [[_run_of(job, part, dialect) for part in job.parts] for job in filled.jobs]
    runs = [*copies, *constants, *(run for of_job in regions for run in of_job)]
    runs.sort(key=lambda run: by_alignment(run.tensors[0]))
    position = 0
    for run in runs:
        run.offset = position
        position += run.nbytes
    tensors = tuple(tensor for run in runs for tensor in run.tensors)
    return OutShard(
        name=name,
        tensors=tensors,
        jobs=tuple(
            job.placed(
                tuple(
                    _region(job, part, run.offset)
                    for part, run in zip(job.parts, of_job, strict=True)
                )
            )
            for job, of_job in zip(filled.jobs, regions, strict=True)
        ),
        copies=tuple(
            Copy(unit.source, unit.read, run.offset, unit.reason, unit.pair_nbytes)
            for unit, run in zip(filled.copies, copies, strict=True)
        ),
        constants=tuple(
            Constant(run.offset, unit.data) for unit, run in zip(fixed, constants, strict=True)
        ),
        header_nbytes=len(header_of(tensors)),
        data_nbytes=position,
    )


def _shapes(job: Job, dialect: Dialect) -> Iterator[ConstantUnit]:
    """The tensors that say N and K of each matrix, where the dialect has them."""
    suffix = dialect.spellings[job.format].shape_suffix
    if not suffix:
        return
    columns = job.place.columns.to_bytes(8, "little")
    sizes = [n.to_bytes(8, "little") + columns for n in job.place.rows]
    for output in job.outputs:
        for module, data in zip(output.modules, sizes, strict=True):
            yield ConstantUnit(OutTensor(f"{module}.{suffix}", "I64", (2,)), data)


def _run_of(job: Job, part: Part, dialect: Dialect) -> _Run:
    """The tensors that hold one part of all slabs of a job."""
    shapes = [part.shape(n, job.place.columns) for n in job.place.rows]
    if job.is_stacked:
        (module,), (shape,) = job.outputs[0].modules, shapes
        name = dialect.tensor_name(job.format, module, part.role, True)
        stacked = (len(job.outputs), *shape[::-1]) if shape else dialect.scalar_shape
        tensor = OutTensor(name, part.dtype, stacked)
        return _Run([tensor], tensor.nbytes)
    ending = dialect.tensor_name(job.format, "", part.role, False)
    stored = [shape or dialect.scalar_shape for shape in shapes]
    tensors = [
        OutTensor(module + ending, part.dtype, shape)
        for output in job.outputs
        for module, shape in zip(output.modules, stored, strict=True)
    ]
    return _Run(tensors, len(job.outputs) * _slab_nbytes(job, part))


def _region(job: Job, part: Part, offset: int) -> Region:
    row_nbytes = part.row_nbytes(job.place.columns)
    if job.is_stacked and row_nbytes:
        row_nbytes = nbytes_of(part.dtype, part.shape(job.place.slab_rows, 1)[:1])
    return Region(part.role, offset, _slab_nbytes(job, part), row_nbytes)
