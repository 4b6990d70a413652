"""Pack outputs into shards, and give every tensor its position.

A unit is what must not be torn apart: a copied tensor, linear layers that share an amax, or one
expert. The experts of a layer are one unit that may be cut between experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from .checkpoint import SINGLE
from .dtypes import nbytes_of
from .formats import Part, QuantFormat
from .plan import Copy, Job, OutShard, OutTensor, Read, Region, by_alignment, header_of

__all__ = ["CopyUnit", "NameOf", "QuantUnit", "pack"]

# The name of an output tensor: from its module, its role, and whether experts are stacked in it.
NameOf = Callable[[str, str, bool], str]

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
class QuantUnit:
    """Jobs whose slabs go together: slab i of each lands in one shard."""

    jobs: tuple[Job, ...]

    @property
    def count(self) -> int:
        """How many pieces the unit may be cut into."""
        first = self.jobs[0]
        return 1 if first.is_stacked else len(first.slabs)


@dataclass(slots=True)
class _Run:
    """Output tensors of one dtype that lie one after another."""

    tensors: list[OutTensor]
    offset: int = 0


@dataclass(slots=True)
class _Bin:
    """A shard while it is filled."""

    nbytes: int = 0
    header_nbytes: int = 0
    copies: list[CopyUnit] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


def pack(
    units: Iterable[CopyUnit | QuantUnit],
    number_format: QuantFormat,
    name_of: NameOf,
    max_nbytes: int,
) -> list[OutShard]:
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
        done = 0
        nbytes, header_nbytes = _piece_nbytes(unit, number_format)
        while done < unit.count:
            into = room_for(nbytes, header_nbytes)
            fits = min(
                (max_nbytes - into.nbytes) // max(nbytes, 1),
                (HEADER_CAP_NBYTES - into.header_nbytes) // header_nbytes,
            )
            count = min(max(fits, 1), unit.count - done)
            into.jobs += (_cut(job, done, done + count) for job in unit.jobs)
            into.nbytes += nbytes * count
            into.header_nbytes += header_nbytes * count
            done += count
    names = _shard_names(len(bins))
    return [
        _place(name, filled, number_format, name_of)
        for name, filled in zip(names, bins, strict=True)
    ]


def _piece_nbytes(unit: QuantUnit, number_format: QuantFormat) -> tuple[int, int]:
    """Output bytes and header bytes of one piece: a slab of each job, or all of a stack."""
    nbytes = header_nbytes = 0
    for job in unit.jobs:
        slabs = len(job.slabs) if job.is_stacked else 1
        for part in number_format.parts:
            nbytes += slabs * _slab_nbytes(job, part)
        longest = max(len(name.encode()) for slab in job.slabs for name in slab.modules)
        header_nbytes += len(job.rows) * len(number_format.parts) * (longest + _ENTRY_NBYTES)
    return nbytes, header_nbytes


def _slab_nbytes(job: Job, part: Part) -> int:
    return sum(nbytes_of(part.dtype, part.shape(n, job.columns)) for n in job.rows)


def _cut(job: Job, start: int, stop: int) -> Job:
    return job if job.is_stacked else replace(job, slabs=job.slabs[start:stop])


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _place(name: str, filled: _Bin, number_format: QuantFormat, name_of: NameOf) -> OutShard:
    """Order the tensors of a shard and compute all offsets."""
    copies = [_Run(list(unit.tensors)) for unit in filled.copies]
    regions = [
        [_Run(list(_job_tensors(job, part, name_of))) for part in number_format.parts]
        for job in filled.jobs
    ]
    runs = [*copies, *(run for of_job in regions for run in of_job)]
    runs.sort(key=lambda run: by_alignment(run.tensors[0]))
    position = 0
    for run in runs:
        run.offset = position
        position += sum(tensor.nbytes for tensor in run.tensors)
    tensors = tuple(tensor for run in runs for tensor in run.tensors)
    return OutShard(
        name=name,
        tensors=tensors,
        jobs=tuple(
            job.placed(
                tuple(
                    _region(job, part, run.offset)
                    for part, run in zip(number_format.parts, of_job, strict=True)
                )
            )
            for job, of_job in zip(filled.jobs, regions, strict=True)
        ),
        copies=tuple(
            Copy(unit.source, unit.read, run.offset, unit.reason, unit.pair_nbytes)
            for unit, run in zip(filled.copies, copies, strict=True)
        ),
        header_nbytes=len(header_of(tensors)),
        data_nbytes=position,
    )


def _job_tensors(job: Job, part: Part, name_of: NameOf) -> Iterator[OutTensor]:
    shapes = [part.shape(n, job.columns) for n in job.rows]
    if job.is_stacked:
        (module,), (shape,) = job.slabs[0].modules, shapes
        stacked = (len(job.slabs), *shape[::-1]) if shape else ()
        yield OutTensor(name_of(module, part.role, True), part.dtype, stacked)
        return
    for slab in job.slabs:
        for module, shape in zip(slab.modules, shapes, strict=True):
            yield OutTensor(name_of(module, part.role, False), part.dtype, shape)


def _region(job: Job, part: Part, offset: int) -> Region:
    row_nbytes = part.row_nbytes(job.columns)
    if job.is_stacked and row_nbytes:
        row_nbytes = nbytes_of(part.dtype, (job.slab_rows,))
    return Region(part.role, offset, _slab_nbytes(job, part), row_nbytes)
