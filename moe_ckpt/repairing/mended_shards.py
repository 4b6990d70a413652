"""The shards of a mended checkpoint: those of the source, by the same names.

What stays is copied, as much at once as lies together. Numbers of whole matrices are in the plan.
Only matrices that come under another global scale are read and changed; all that share it go to
the shard of the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..dialects import DIALECTS, Dialect
from ..formats import find_format
from ..layouts.places import place_of_linears
from ..plan import Job, Output, OutShard, OutTensor, by_alignment
from ..planning.shards import ConstantUnit, CopyUnit, QuantUnit, Unit, shard_of
from ..source.checkpoint import SINGLE
from ..source.headers import TensorInfo
from ..source.stored import Place, Read
from ..verify.inventory import Module
from .draft import Draft, Shared

__all__ = ["mended_shards"]

_REASON = "stays as it is"
_MOST_NBYTES = 64 << 20  # of one copy, so that several threads share a shard
_MOVED = ("qweight", "block_scale")


def mended_shards(draft: Draft) -> tuple[OutShard, ...]:
    """Every output shard, with the place of every tensor."""
    units: dict[str, list[Unit]] = {name: [] for name in draft.subject.source.shards}
    written: set[str] = set()
    for shard_name, jobs in _jobs(draft).items():
        units[shard_name] += (QuantUnit((job,)) for job in jobs)
    for shared in draft.shared:
        for module in shared.modules:
            written.update(i.name for p, i in module.parts if p.role in _MOVED)
    for info in draft.subject.source.tensors.values():
        number = draft.numbers.get(info.name)
        if number is not None:
            units[info.shard].append(_constant(info.name, info.shape, number))
            written.add(info.name)
    for name, added in draft.added.items():
        units[added.codes.shard].append(_constant(name, added.shape, added.number))
    by_shard: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in draft.subject.source.tensors.values():
        if info.name not in written:
            by_shard[info.shard].append(info)
    for shard, infos in by_shard.items():
        units[shard] += _copies(infos, draft.dtypes)
    filled = [name for name, found in units.items() if found]
    names = [SINGLE] if len(filled) == 1 else filled
    dialect = _dialect(draft)
    return tuple(
        shard_of(name, units[shard], dialect) for name, shard in zip(names, filled, strict=True)
    )


def _constant(name: str, shape: tuple[int, ...], number: float) -> ConstantUnit:
    return ConstantUnit(OutTensor(name, "F32", shape), np.float32(number).tobytes())


def _copies(infos: Iterable[TensorInfo], dtypes: Mapping[str, str]) -> Iterator[CopyUnit]:
    """What is copied of a shard, in the order of its bytes."""
    run: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: info.offset):
        if run and not _continues(run, info):
            yield _copy(run, dtypes)
            run = []
        run.append(info)
    if run:
        yield _copy(run, dtypes)


def _continues(run: Sequence[TensorInfo], info: TensorInfo) -> bool:
    first, last = run[0], run[-1]
    tensors = [OutTensor(i.name, i.dtype, i.shape) for i in (first, info)]
    return (
        last.offset + last.nbytes == info.offset
        and by_alignment(tensors[0]) == by_alignment(tensors[1])
        and info.offset + info.nbytes - first.offset <= _MOST_NBYTES
    )


def _copy(run: Sequence[TensorInfo], dtypes: Mapping[str, str]) -> CopyUnit:
    first, last = run[0], run[-1]
    return CopyUnit(
        source=first.name,
        read=Read(first.shard, first.offset, last.offset + last.nbytes - first.offset),
        tensors=tuple(OutTensor(i.name, dtypes.get(i.name, i.dtype), i.shape) for i in run),
        reason=_REASON,
    )


def _jobs(draft: Draft) -> dict[str, list[Job]]:
    """What brings matrices under one global scale, by shard; those alike are one job."""
    alike: dict[tuple[str, tuple[object, ...]], list[tuple[Place, Shared]]] = defaultdict(list)
    for shared in draft.shared:
        place = _place(draft, shared)
        shard = shared.modules[0].parts[0][1].shard
        kind = (place.rows, place.columns, shared.inverse, place.encoded)
        alike[shard, kind].append((place, shared))
    jobs: dict[str, list[Job]] = defaultdict(list)
    for (shard, _), found in alike.items():
        first = found[0][0]
        row = find_format(first.encoded.format)
        jobs[shard].append(
            Job(
                place=replace(first, slabs=tuple(s for place, _ in found for s in place.slabs)),
                outputs=tuple(Output(tuple(m.name for m in of.modules)) for _, of in found),
                format=row.name,
                parts=tuple(part for part in row.parts if part.role in _MOVED),
                is_recoded=True,
            )
        )
    return jobs


def _place(draft: Draft, shared: Shared) -> Place:
    """Where matrices lie; those with an input scale and those without are read alike."""
    weights = draft.subject.weights
    names = [f"{module.name}.weight" for module in shared.modules]
    place = place_of_linears(weights, names)
    encoded = place.encoded
    parts = tuple(part for part in encoded.parts if part.role != "input_scale")
    inverse = ("global_scale",) if shared.inverse else ()
    (slab,) = place.slabs
    reads = tuple(tuple(of_one[: len(parts)]) for of_one in slab.reads)
    return replace(
        place,
        slabs=(slab._replace(reads=reads),),
        encoded=replace(encoded, format="nvfp4-w4a16", parts=parts, inverse=inverse),
    )


def _dialect(draft: Draft) -> Dialect:
    """A dialect that gives codes and block scales the names that they have."""
    for dialect in DIALECTS:
        spelling = dialect.spellings.get("nvfp4-w4a16")
        if spelling and all(_is_spelled(m, dialect) for s in draft.shared for m in s.modules):
            return dialect
    return DIALECTS[0]


def _is_spelled(module: Module, dialect: Dialect) -> bool:
    return all(
        info.name == dialect.tensor_name("nvfp4-w4a16", module.name, part.role, False)
        for part, info in module.parts
        if part.role in _MOVED
    )
