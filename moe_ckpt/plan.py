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
from .loaders.loader import Verdict
from .origin import Origin
from .source.checkpoint import SideFile
from .source.headers import Shard
from .source.stored import Place, Read

__all__ = ["Constant", "Copy", "Job", "OutShard", "OutTensor", "Output", "Plan", "Region"]
__all__ += ["by_alignment"]


class Output(NamedTuple):
    """What a slab becomes: an output module for each of its matrices.

    ``amax``: the largest magnitude of the slab's weights, if an earlier scan found it.
    """

    modules: tuple[str, ...]
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
    """Slabs that become matrices of one format in one output shard.

    ``place``: where they lie in the source. ``outputs``: what each becomes. ``parts`` are what a
    matrix becomes; ``inverse`` are the roles of which the output stores the reciprocal.

    ``is_recoded``: the parts are moved as they are, or cast exactly, and not quantized anew.
    ``input_amax`` is shared by all slabs; None stands for the input scale of the source if it has
    one and is recoded, else for the constant 1.0.

    ``is_stacked``: all slabs share one amax and become one tensor [S, K, N] for each role.
    """

    place: Place
    outputs: tuple[Output, ...]
    format: str
    parts: tuple[Part, ...]
    inverse: tuple[str, ...] = ()
    input_amax: float | None = None
    is_recoded: bool = False
    is_stacked: bool = False
    regions: tuple[Region, ...] = ()

    @property
    def is_gathered(self) -> bool:
        """Whether stored rows become columns of the output, so that it is whole only at the end.

        Stored rows are columns of the matrix if it is transposed, and a stack is written
        transposed.
        """
        return self.place.is_transposed != self.is_stacked

    def cut(self, start: int, stop: int) -> Job:
        """The job of slabs ``start`` to ``stop``; a stack is never cut."""
        if self.is_stacked:
            return self
        return replace(self, place=self.place.cut(start, stop), outputs=self.outputs[start:stop])

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
        return copied + sum(job.place.read_nbytes for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, decided.

    ``files`` are the configuration files, name -> text, in the order they are written.
    ``experts_as`` is "split" or "fused"; ``verdicts`` say for every runtime whether it loads the
    result, and why it does not.
    ``formats``: format -> how many matrices become that, those of experts first.
    """

    root: Path
    model_type: str
    family: str
    verdicts: tuple[Verdict, ...]
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
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that load the result."""
        return tuple(verdict.runtime for verdict in self.verdicts if verdict.loads)

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
        return sum(job.place.read_nbytes for job in self.jobs)

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
                state.update(_text_of(job).encode())
            for item in (*(replace(copy, reason="") for copy in shard.copies), *shard.constants):
                state.update(repr(item).encode())
        state.update(repr(list(kinds)).encode())
        return state.hexdigest()


def _text_of(job: Job) -> str:
    """What a digest covers of a job; journals hold digests, so the text must not change."""
    place = job.place
    reads = [tuple(read) for slab in place.slabs for r in slab.reads for read in r]
    made = [tuple(output) for output in job.outputs]
    return (
        f"({reads!r}, {made!r}, Job(slabs=(), source_rows={place.source_rows!r}, "
        f"rows={place.rows!r}, columns={place.columns!r}, encoded={place.encoded!r}, "
        f"dtype={place.dtype!r}, format={job.format!r}, parts={job.parts!r}, "
        f"inverse={job.inverse!r}, input_amax={job.input_amax!r}, is_recoded={job.is_recoded!r}, "
        f"is_transposed={place.is_transposed!r}, is_interleaved={place.is_interleaved!r}, "
        f"is_stacked={job.is_stacked!r}, regions={job.regions!r}))"
    )


def by_alignment(tensor: OutTensor) -> int:
    """Sort key: wide items first, so that every tensor is aligned for readers that map files."""
    return -itemsize(tensor.dtype)
