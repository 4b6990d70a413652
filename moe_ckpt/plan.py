"""The plan: every byte position of the output, decided from headers alone.

A plan is an immutable value made without torch. The dry run prints it, the conversion carries
it out, and the index and configuration are written from it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .dtypes import itemsize, nbytes_of
from .formats import UNQUANTIZED, Part
from .layouts import Experts
from .planning.origin import Origin
from .source.checkpoint import SideFile
from .source.headers import Shard

__all__ = ["Constant", "Copy", "Encoded", "Job", "OutShard", "OutTensor", "Plan", "Read"]
__all__ += ["Region", "Slab", "by_alignment"]


class Read(NamedTuple):
    """A contiguous byte range of a source shard."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """How source weights are stored: as the parts of a number format, in their dtypes.

    The code comes first; weights that are not quantized have no other part, and the format
    `UNQUANTIZED` whatever their dtype. ``inverse``: roles that hold the reciprocal.
    """

    format: str
    parts: tuple[Part, ...]
    inverse: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.format)  # of all parts it would take long, and nearly all are equal

    @property
    def is_plain(self) -> bool:
        """Whether the weights are not quantized."""
        return self.format == UNQUANTIZED

    @property
    def has_input_scale(self) -> bool:
        """Whether a static activation scale is stored beside the weights."""
        return any(part.role == "input_scale" for part in self.parts)

    @property
    def row_step(self) -> int:
        """Rows that share an item of some part."""
        return max(part.rows for part in self.parts)


class Slab(NamedTuple):
    """Matrices stacked by rows that share one weight amax, such as gate and up of an expert.

    ``reads``: for each source tensor in order, the bytes of each of its parts. ``labels``: what to
    call each tensor in a message. ``modules``: the output modules, one for each part of the rows.
    ``amax``: the largest magnitude, if an earlier scan found it.
    """

    reads: tuple[tuple[Read, ...], ...]
    modules: tuple[str, ...]
    labels: tuple[str, ...]
    amax: float | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """Where a job's tensors of one role lie: slab after slab, in each part after part.

    ``offset`` counts from the start of the output file's data. ``row_nbytes`` is that of a stored
    row, and 0 for scalars.
    """

    role: str
    offset: int
    slab_nbytes: int
    row_nbytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """Slabs of one shape that become matrices of one format in one output shard.

    ``source_rows`` holds N of each source tensor of a slab, ``rows`` of each output module,
    ``columns`` is K. ``dtype`` is that of the weights when they are decoded. ``parts`` are what a
    matrix becomes; ``inverse`` are the roles of which the output stores the reciprocal.

    ``is_recoded``: the parts are moved as they are, or cast exactly, and not quantized anew.
    ``input_amax`` is shared by all slabs; None stands for the input scale of the source if it has
    one and is recoded, else for the constant 1.0.

    ``is_transposed``: the source stores slabs [K, N]. ``is_interleaved``: rows of the two parts
    alternate there. ``is_stacked``: all slabs share one amax and become one tensor [S, K, N] for
    each role.
    """

    slabs: tuple[Slab, ...]
    source_rows: tuple[int, ...]
    rows: tuple[int, ...]
    columns: int
    encoded: Encoded
    dtype: str
    format: str
    parts: tuple[Part, ...]
    inverse: tuple[str, ...] = ()
    input_amax: float | None = None
    is_recoded: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    is_stacked: bool = False
    regions: tuple[Region, ...] = ()

    @property
    def slab_rows(self) -> int:
        """Rows of one slab, all parts together."""
        return sum(self.rows)

    @property
    def slab_nbytes(self) -> int:
        """Bytes of one slab when it is decoded."""
        return nbytes_of(self.dtype, (self.slab_rows, self.columns))

    @property
    def read_nbytes(self) -> int:
        """Source bytes of all slabs."""
        first = self.slabs[0]
        return len(self.slabs) * sum(read.nbytes for reads in first.reads for read in reads)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of a slab as the source stores it."""
        shape = (self.slab_rows, self.columns)
        return shape[::-1] if self.is_transposed else shape

    @property
    def stored_row_nbytes(self) -> int:
        """Bytes of one stored row when it is decoded."""
        return nbytes_of(self.dtype, self.stored_shape[1:])

    def placed(self, regions: tuple[Region, ...]) -> Job:
        """The same job with the positions of its output."""
        return replace(self, regions=regions)


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a tensor that are copied; ``offset`` counts from the start of the output data.

    ``pair_nbytes``: not 0 if items of gate and up alternate in the source, and all of gate's come
    first in the output; the size of one pair.
    """

    source: str
    read: Read
    offset: int
    reason: str
    pair_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes that the plan itself decides; ``offset`` counts from the start of the output data."""

    offset: int
    data: bytes


class OutTensor(NamedTuple):
    """One tensor of an output shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OutShard:
    """One output file; ``tensors`` are in the order of their bytes."""

    name: str
    tensors: tuple[OutTensor, ...]
    jobs: tuple[Job, ...]
    copies: tuple[Copy, ...]
    constants: tuple[Constant, ...]
    header_nbytes: int
    data_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.header_nbytes + self.data_nbytes

    @property
    def read_nbytes(self) -> int:
        """Bytes of weights that are read for it."""
        copied = sum(copy.read.nbytes for copy in self.copies)
        return copied + sum(job.read_nbytes for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, decided.

    ``files`` are the configuration files, name -> text, in the order they are written.
    ``experts_as`` is "split" or "fused"; ``runtimes`` are the runtimes known to read the result.
    ``formats``: format -> how many matrices become that, those of experts first.
    """

    root: Path
    model_type: str
    family: str
    runtimes: tuple[str, ...]
    formats: Mapping[str, int]
    dialect: str
    experts_as: str
    source_shards: tuple[Shard, ...]
    source_nbytes: int
    num_parameters: int
    experts: tuple[Experts, ...]
    shards: tuple[OutShard, ...]
    files: Mapping[str, str]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    stats_files: tuple[str, ...]
    stats_covered: int
    notes: tuple[str, ...]
    warnings_by_kind: Mapping[str, tuple[str, ...]]
    origin: Origin

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings."""
        return tuple(text for texts in self.warnings_by_kind.values() for text in texts)

    @property
    def tensors_nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.data_nbytes for shard in self.shards)

    @property
    def write_nbytes(self) -> int:
        """Bytes of everything that is written."""
        files = sum(len(text.encode()) for text in self.files.values())
        sides = sum(file.nbytes for file in self.side_files)
        return sum(shard.nbytes for shard in self.shards) + files + sides

    @property
    def jobs(self) -> Iterator[Job]:
        """All jobs."""
        return (job for shard in self.shards for job in shard.jobs)

    @property
    def quantized_matrices(self) -> int:
        """How many matrices are quantized, those in a stack counted one by one."""
        return sum(count for name, count in self.formats.items() if name != UNQUANTIZED)

    @property
    def converted_nbytes(self) -> int:
        """Source bytes of what is quantized, decoded or recoded."""
        return sum(job.read_nbytes for job in self.jobs)

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """What is copied: reason -> (tensors, bytes)."""
        sources: dict[str, set[str]] = {}
        nbytes: Counter[str] = Counter()
        for shard in self.shards:
            for copy in shard.copies:
                sources.setdefault(copy.reason, set()).add(copy.source)
                nbytes[copy.reason] += copy.read.nbytes
        return {reason: (len(names), nbytes[reason]) for reason, names in sources.items()}

    @property
    def read_nbytes(self) -> int:
        """Bytes of weights that are read, each counted once."""
        return sum(shard.read_nbytes for shard in self.shards)

    def digest(self) -> str:
        """SHA-256 over everything that decides an output byte or its place."""
        state = hashlib.sha256()
        state.update(json.dumps([self.dialect, dict(self.files)]).encode())
        for source in self.source_shards:
            state.update(f"{source.name} {source.nbytes}\n".encode())
        # There can be 300,000 tensors, so values that many of them share are written once.
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        for shard in self.shards:
            state.update(
                "\n".join([shard.name, *(tensor.name for tensor in shard.tensors)]).encode()
            )
            seen = [kinds.setdefault((t.dtype, t.shape), len(kinds)) for t in shard.tensors]
            state.update(repr(seen).encode())
            for job in shard.jobs:
                reads = [tuple(read) for slab in job.slabs for r in slab.reads for read in r]
                made = [(slab.modules, slab.amax) for slab in job.slabs]
                state.update(repr((reads, made, replace(job, slabs=()))).encode())
            for item in (*(replace(copy, reason="") for copy in shard.copies), *shard.constants):
                state.update(repr(item).encode())
        state.update(repr(list(kinds)).encode())
        return state.hexdigest()


def by_alignment(tensor: OutTensor) -> int:
    """Sort key: wide items first, so that every tensor is aligned for readers that map files."""
    return -itemsize(tensor.dtype)
