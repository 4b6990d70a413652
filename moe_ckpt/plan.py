"""The plan: every byte position of the output, decided from headers alone.

A plan is an immutable value made without torch. The dry run prints it, the conversion carries
it out, and the index and configuration are written from it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import SideFile
from .dtypes import itemsize, nbytes_of
from .headers import Shard
from .layouts import Experts

__all__ = ["Copy", "Job", "OutShard", "OutTensor", "Plan", "Read", "Region", "Slab"]
__all__ += ["by_alignment", "header_of", "index_of"]


@dataclass(frozen=True, slots=True)
class Read:
    """A contiguous byte range of a source shard."""

    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Slab:
    """Matrices stacked by rows that share one weight amax, such as gate and up of an expert.

    ``reads`` are its source bytes in order, ``labels`` what to call each in a message;
    ``modules`` are the output modules, one for each part.
    """

    reads: tuple[Read, ...]
    modules: tuple[str, ...]
    labels: tuple[str, ...]


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
    """Slabs of one shape that become quantized matrices in one output shard.

    ``rows`` holds N of each part, ``columns`` is K. ``input_amax`` is shared by all slabs; None
    stands for the constant activation scale 1.0.

    ``is_transposed``: the source stores slabs [K, N]. ``is_interleaved``: rows of the two parts
    alternate there. ``is_stacked``: all slabs share one amax and become one tensor [S, K, N] for
    each role, as the source has them.
    """

    slabs: tuple[Slab, ...]
    rows: tuple[int, ...]
    columns: int
    dtype: str
    input_amax: float | None
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
        """Source bytes of one slab."""
        return nbytes_of(self.dtype, (self.slab_rows, self.columns))

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of a slab as the source stores it."""
        shape = (self.slab_rows, self.columns)
        return shape[::-1] if self.is_transposed else shape

    @property
    def stored_row_nbytes(self) -> int:
        """Source bytes of one stored row."""
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
class OutTensor:
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
    header_nbytes: int
    data_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.header_nbytes + self.data_nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion, decided.

    ``files`` are the configuration files, name -> text, in the order they are written.
    ``experts_as`` is "split" or "fused"; ``loaders`` are the runtimes known to read the result.
    """

    root: Path
    model_type: str
    family: str
    loaders: tuple[str, ...]
    format: str
    quantize: str
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
    def quantized_matrices(self) -> int:
        """How many matrices are quantized, those in a stack counted one by one."""
        jobs = [job for shard in self.shards for job in shard.jobs]
        stacked = [found for found in self.experts if self.experts_as == "fused"]
        return sum(len(job.rows) * len(job.slabs) for job in jobs if not job.is_stacked) + sum(
            found.num_experts * len(found.projections) for found in stacked
        )

    @property
    def quantized_nbytes(self) -> int:
        """Source bytes of what is quantized."""
        return sum(job.slab_nbytes * len(job.slabs) for shard in self.shards for job in shard.jobs)

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
        return self.quantized_nbytes + sum(nbytes for _, nbytes in self.kept.values())

    def digest(self) -> str:
        """SHA-256 over everything that decides an output byte or its place."""
        state = hashlib.sha256()
        state.update(json.dumps([self.format, dict(self.files)]).encode())
        for source in self.source_shards:
            state.update(f"{source.name} {source.nbytes}\n".encode())
        for shard in self.shards:
            state.update(shard.name.encode())
            state.update(header_of(shard.tensors))
            for item in (*shard.jobs, *shard.copies):
                state.update(repr(item).encode())
        return state.hexdigest()


def header_of(tensors: tuple[OutTensor, ...]) -> bytes:
    """The first bytes of a safetensors file: length and JSON, padded so that data is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(plan: Plan) -> str | None:
    """The text of model.safetensors.index.json; None for a single file, which needs none."""
    if len(plan.shards) == 1:
        return None
    weight_map = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    metadata = {"total_parameters": plan.num_parameters, "total_size": plan.tensors_nbytes}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def by_alignment(tensor: OutTensor) -> int:
    """Sort key: wide items first, so that every tensor is aligned for readers that map files."""
    return -itemsize(tensor.dtype)
