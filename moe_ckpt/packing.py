"""Pack outputs into shards, and give every tensor its position.

A unit is what must not be torn apart: a copied tensor, linear layers that share an amax, or one
expert. The experts of a layer are one unit that may be cut between experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .checkpoint import SINGLE
from .dtypes import nbytes_of
from .formats import Part, QuantFormat
from .headers import TensorInfo
from .plan import Copy, Job, OutShard, OutTensor, Read, Region, by_alignment, header_of

__all__ = ["CopyUnit", "QuantUnit", "pack"]

# Readers refuse headers over 100 MB; an entry is its name and at most this much more.
HEADER_CAP_NBYTES = 90_000_000
_ENTRY_NBYTES = 120


@dataclass(frozen=True, slots=True)
class CopyUnit:
    """A tensor that is copied."""

    info: TensorInfo
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class QuantUnit:
    """Jobs whose slabs go together: slab i of each lands in one shard."""

    jobs: tuple[Job, ...]

    @property
    def count(self) -> int:
        """How many pieces the unit may be cut into."""
        return len(self.jobs[0].slabs)


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
    suffixes: dict[str, str],
    max_nbytes: int,
) -> list[OutShard]:
    """Fill shards in order, each with at most ``max_nbytes`` of tensors.

    A single piece that is larger gets a shard of its own. ``suffixes``: role -> tensor suffix.
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
            header_nbytes = len(unit.name.encode()) + _ENTRY_NBYTES
            into = room_for(unit.info.nbytes, header_nbytes)
            into.copies.append(unit)
            into.nbytes += unit.info.nbytes
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
        _place(name, filled, number_format, suffixes)
        for name, filled in zip(names, bins, strict=True)
    ]


def _piece_nbytes(unit: QuantUnit, number_format: QuantFormat) -> tuple[int, int]:
    """Output bytes and header bytes of one slab of each job."""
    nbytes = header_nbytes = 0
    for job in unit.jobs:
        for part in number_format.parts:
            nbytes += sum(nbytes_of(part.dtype, part.shape(n, job.columns)) for n in job.rows)
        longest = max(len(name.encode()) for slab in job.slabs for name in slab.modules)
        header_nbytes += len(job.rows) * len(number_format.parts) * (longest + _ENTRY_NBYTES)
    return nbytes, header_nbytes


def _cut(job: Job, start: int, stop: int) -> Job:
    return Job(job.slabs[start:stop], job.rows, job.columns, job.dtype, job.input_amax)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _place(
    name: str, filled: _Bin, number_format: QuantFormat, suffixes: dict[str, str]
) -> OutShard:
    """Order the tensors of a shard and compute all offsets."""
    copies = [_Run([OutTensor(u.name, u.info.dtype, u.info.shape)]) for u in filled.copies]
    regions = [
        [_Run(list(_job_tensors(job, part, suffixes))) for part in number_format.parts]
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
            Copy(
                unit.info.name,
                Read(unit.info.shard, unit.info.offset, unit.info.nbytes),
                run.offset,
                unit.reason,
            )
            for unit, run in zip(filled.copies, copies, strict=True)
        ),
        header_nbytes=len(header_of(tensors)),
        data_nbytes=position,
    )


def _job_tensors(job: Job, part: Part, suffixes: dict[str, str]) -> Iterator[OutTensor]:
    suffix = suffixes[part.role]
    shapes = [part.shape(n, job.columns) for n in job.rows]
    for slab in job.slabs:
        for module, shape in zip(slab.modules, shapes, strict=True):
            yield OutTensor(f"{module}.{suffix}", part.dtype, shape)


def _region(job: Job, part: Part, offset: int) -> Region:
    slab_nbytes = sum(nbytes_of(part.dtype, part.shape(n, job.columns)) for n in job.rows)
    return Region(part.role, offset, slab_nbytes, part.row_nbytes(job.columns))
