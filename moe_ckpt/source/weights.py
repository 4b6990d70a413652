"""The weights of a source as matrices of numbers, whatever they are stored as.

A quantized weight is several tensors. Here they become one, of the shape that the weight has and
under the name that it would have, so that what follows (layouts, experts, linear layers) need not
know. Only where bytes are read do the tensors behind it count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..dtypes import BITS, FLOATS, nbytes_of
from ..errors import CheckpointError, Problems, show, show_some
from ..formats import Part, find_format, without_input_scale
from .checkpoint import Source
from .declared import Declared, declarations
from .encodings import (
    CODE_DTYPES,
    ENCODINGS,
    INPUT_NAMES,
    REFUSED_ENDINGS,
    SCALE_ENDINGS,
    SHAPE_ENDINGS,
    Encoding,
    name_beside,
)
from .headers import TensorInfo
from .packings import name_of_packing
from .stored import Encoded, Read, plain

__all__ = ["Found", "Weights", "find_weights", "weights_in", "weights_of"]

_CODE_ENDINGS = tuple(
    f"{weight}{of.ending}" for of in ENCODINGS if of.ending for weight in ("weight", "_proj")
)
# What may lie beside codes, by their own ending, after the name of their weight.
_BESIDE = {
    of.ending: tuple(
        dict.fromkeys(
            (
                *(scale.ending for e in ENCODINGS if e.ending == of.ending for scale in e.scales),
                *REFUSED_ENDINGS,
                *SHAPE_ENDINGS,
            )
        )
    )
    for of in ENCODINGS
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """How quantized weights of one shape are stored.

    ``scales``: the endings of the tensors beside the codes, one for each other part. ``others``:
    endings of what else belongs to them. ``part_nbytes``: bytes of each part of one matrix.
    ``steps``: bytes from the part of one matrix to that of the next, 0 if they share it.
    """

    name: str
    encoded: Encoded
    shape: tuple[int, ...]
    scales: tuple[str, ...]
    others: tuple[str, ...]
    part_nbytes: tuple[int, ...]
    steps: tuple[int, ...]


class _Stored(NamedTuple):
    """A quantized weight: of which kind, and the tensors behind it, one for each part."""

    kind: _Kind
    infos: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The quantized weights among tensors, and what is left of some.

    ``unread``: codes of which no known encoding fits, with the name of their weight. ``twice``:
    weights that are stored in two ways, with the codes that came last. ``orphans``: scales that
    belong to no weight.
    """

    stored: Mapping[str, _Stored] = field(repr=False)
    kinds: tuple[_Kind, ...] = field(repr=False)
    beside: Set[str] = field(repr=False)
    unread: tuple[tuple[TensorInfo, str], ...]
    twice: tuple[tuple[str, str], ...]
    orphans: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a source, each quantized weight as one.

    ``tensors``: a quantized weight has dtype F32, as which it is decoded. ``encodings``: what the
    quantized ones are stored as -> how many. ``kv_cache``: whether k and v are to be stored as FP8.
    """

    tensors: Mapping[str, TensorInfo]
    encodings: Mapping[str, int]
    kv_cache: bool
    warnings: tuple[str, ...]
    _stored: Mapping[str, _Stored] = field(repr=False)
    _kinds: tuple[_Kind, ...] = field(repr=False)

    def encoded(self, name: str) -> Encoded:
        """How a weight is stored."""
        stored = self._stored.get(name)
        return stored.kind.encoded if stored else plain(self.tensors[name].dtype)

    def reads(self, name: str, start: int = 0, count: int | None = None) -> tuple[Read, ...]:
        """The bytes of ``count`` weights of a tensor, from weight ``start`` on, for each part.

        For a quantized tensor they are whole matrices [N, K].
        """
        info = self.tensors[name]
        stored = self._stored.get(name)
        if stored is None:
            bits = BITS[info.dtype]
            nbytes = info.nbytes if count is None else count * bits // 8
            return (Read(info.shard, info.offset + start * bits // 8, nbytes),)
        n, k = info.shape[-2:]
        first, matrices = start // (n * k), (info.shape[0] if len(info.shape) == 3 else 1)
        if count is not None:
            matrices = count // (n * k)
        return tuple(
            [
                Read(tensor.shard, tensor.offset + first * step, max(matrices * step, nbytes))
                for tensor, nbytes, step in zip(
                    stored.infos, stored.kind.part_nbytes, stored.kind.steps, strict=True
                )
            ]
        )

    def stored_as(self, name: str) -> tuple[tuple[Part, TensorInfo], ...]:
        """The parts of a quantized weight and their tensors, codes first; () of any other."""
        stored = self._stored.get(name)
        return tuple(zip(stored.kind.encoded.parts, stored.infos, strict=True)) if stored else ()

    def all_encoded(self) -> set[Encoded]:
        """The ways in which quantized weights are stored."""
        return {kind.encoded for kind in self._kinds}

    def what_is(self, name: str) -> str:
        """What a tensor is stored as, for people; '' if it is not quantized."""
        stored = self._stored.get(name)
        return stored.kind.name if stored else ""


def weights_of(source: Source) -> Weights:
    """The weights of a source.

    Raises:
        CheckpointError: with every quantized weight that cannot be read, and why.
    """
    tensors = source.tensors
    declared = declarations(source)
    problems = Problems()
    found = find_weights(tensors)
    for name, codes in found.twice:
        problems.add(
            CheckpointError,
            f"{show(name)}: is stored twice, also as {show(codes)}; which of them counts cannot be "
            "told",
        )
    if found.unread:
        unread = [_why_not(info, stem, tensors) for info, stem in found.unread]
        problems.add(CheckpointError, f"{show_some(unread)}{_seems(tensors)}")
    problems.check()
    if found.orphans:
        problems.add(
            CheckpointError,
            f"{show_some(found.orphans)}: belongs to no quantized weight; the checkpoint is "
            "incomplete, or quantized in a way that this version does not know"
            f"{_seems(tensors)}",
        )
    for said in declared:
        said.refuse_contradictions(
            ((name, of.kind.encoded.format, of.kind.name) for name, of in found.stored.items()),
            problems,
        )
    problems.check()
    return weights_in(tensors, found, declared)


def find_weights(tensors: Mapping[str, TensorInfo]) -> Found:
    """The quantized weights among tensors, whole or not."""
    return _Finder(tensors).all_weights()


def weights_in(
    tensors: Mapping[str, TensorInfo], found: Found, declared: Sequence[Declared]
) -> Weights:
    """Tensors with their quantized weights as one each; what is unread or left over is not in."""
    names = {of.infos[0].name: name for name, of in found.stored.items()}
    gone = {info.name for info, _ in found.unread} | found.beside | {*found.orphans}
    kept = {}
    for name, info in tensors.items():
        if name in names:
            stored = found.stored[names[name]]
            kept[names[name]] = TensorInfo(
                names[name], "F32", stored.kind.shape, info.shard, info.offset, info.nbytes
            )
        elif name not in gone:
            kept[name] = info
    warnings = [of.unknown_kv_cache for of in declared if of.unknown_kv_cache]
    if declared and not found.stored:
        warnings.append(
            f"{declared[0].where} says that the weights are quantized, and none is; what it says "
            "is replaced"
        )
    return Weights(
        tensors=kept,
        encodings=Counter(of.kind.name for of in found.stored.values()),
        kv_cache=any(of.has_kv_cache for of in declared),
        warnings=tuple(warnings),
        _stored=found.stored,
        _kinds=found.kinds,
    )


class _Finder:
    """Finds the quantized weights among tensors.

    Weights whose tensors are alike in endings, dtypes and shapes are of one kind, which is worked
    out for the first of them. ``beside``: the names of all tensors that are not codes.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._known: dict[tuple[object, ...], _Kind | None] = {}
        self.beside: set[str] = set()

    def all_weights(self) -> Found:
        """The quantized weights, by the names they would have if they were not."""
        tensors = self._tensors
        found: dict[str, _Stored] = {}
        unread: list[tuple[TensorInfo, str]] = []
        twice: list[tuple[str, str]] = []
        for info in tensors.values():
            stem = _stem(info, tensors) if info.dtype in CODE_DTYPES else None
            if stem is None:
                continue
            stored = self._find(info, stem)
            if stored is None:
                unread.append((info, stem))
                continue
            name = info.name if info.name.endswith("_blocks") else stem
            if name in found or (name != info.name and name in tensors):
                twice.append((name, info.name))
            found[name] = stored
        names = {of.infos[0].name for of in found.values()}
        beside = self.beside
        orphans = [
            name
            for name in tensors
            if name not in beside and name not in names and _is_scale(tensors[name])
        ]
        kinds = tuple(kind for kind in self._known.values() if kind is not None)
        return Found(found, kinds, beside, tuple(unread), tuple(twice), tuple(orphans))

    def _find(self, codes: TensorInfo, stem: str) -> _Stored | None:
        """The weight that these are the codes of, if it is stored in a way that can be read."""
        own = codes.name[len(stem) :]
        beside: dict[str, TensorInfo] = {}
        for ending in _BESIDE[own]:
            if (info := self._tensors.get(name_beside(stem, ending))) is not None:
                beside[ending] = info
        for ending in INPUT_NAMES:
            if (info := self._tensors.get(_input_of(stem, ending))) is not None:
                beside[ending] = info
        looks = [(ending, info.dtype, info.shape) for ending, info in beside.items()]
        key = (own, codes.dtype, codes.shape, *looks)
        try:
            kind = self._known[key]
        except KeyError:
            kind = self._known[key] = _kind_of(codes, stem, beside)
        if kind is None:
            return None
        scales = [beside[ending] for ending in kind.scales]
        self.beside.update([beside[ending].name for ending in (*kind.scales, *kind.others)])
        return _Stored(kind, (codes, *scales))


def _seems(tensors: Mapping[str, TensorInfo]) -> str:
    """What packed the weights, for the end of a message; '' if nothing known did."""
    packing = name_of_packing({name: info.dtype for name, info in tensors.items()})
    return f"; it seems to be packed as {packing}" if packing else ""


def _input_of(stem: str, name: str) -> str:
    """The tensor of activations beside a weight, or beside a stack of them."""
    return stem[:-6] + name if stem.endswith("weight") else f"{stem}_{name}"


def _is_scale(info: TensorInfo) -> bool:
    """Whether a tensor means nothing without its weight."""
    return info.name.endswith(SCALE_ENDINGS) or (
        info.dtype == "F8_E8M0" and info.name.endswith(".scale")
    )


def _stem(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of the weight that these could be the codes of; None if they cannot."""
    if len(info.shape) < 2:
        return None
    if info.name.endswith(_CODE_ENDINGS):
        return info.name.rpartition("_")[0]
    return info.name if _is_weight(info, tensors) else None


def _is_weight(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor of codes is a weight by its name, or a stack of experts."""
    if info.name.endswith(".weight") and len(info.shape) == 2:
        return True
    if len(info.shape) != 3 or info.name.endswith(("_scale", "_scale_inv")):
        return False
    return info.dtype == "F8_E4M3" or f"{info.name}_scale_inv" in tensors


def _kind_of(codes: TensorInfo, stem: str, beside: Mapping[str, TensorInfo]) -> _Kind | None:
    """How the weight of these codes is stored; None if it cannot be read."""
    if any(ending in beside for ending in REFUSED_ENDINGS):
        return None
    for encoding in ENCODINGS:
        if codes.name == stem + encoding.ending and encoding.fits(codes, beside):
            return _kind_in(encoding, codes, beside)
    return None


def _kind_in(encoding: Encoding, codes: TensorInfo, beside: Mapping[str, TensorInfo]) -> _Kind:
    """The kind of a weight that is stored in this encoding."""
    parts = [Part("qweight", encoding.dtypes[0], encoding.columns)]
    parts += [scale.part(beside[scale.ending].dtype) for scale in encoding.scales]
    scales = [scale.ending for scale in encoding.scales]
    number_format = encoding.format
    inputs = [ending for ending in INPUT_NAMES if ending in beside]
    first = beside[inputs[0]] if inputs else None
    lead, n, k = encoding.sizes(codes) or ((), 0, 0)
    counts = (1, prod(lead))
    is_number = first is not None and first.dtype in FLOATS and prod(first.shape) in counts
    if find_format(number_format).input_scale and first is not None and is_number:
        parts.append(Part("input_scale", first.dtype, 0))
        scales.append(inputs[0])
    else:
        number_format = without_input_scale(number_format)
    part_nbytes = tuple(nbytes_of(part.dtype, part.shape(n, k)) for part in parts)
    stored = [codes, *(beside[ending] for ending in scales)]
    return _Kind(
        name=encoding.name,
        encoded=Encoded(number_format, tuple(parts), encoding.inverse),
        shape=(*lead, n, k),
        scales=tuple(scales),
        others=tuple(ending for ending in (*SHAPE_ENDINGS, *inputs) if ending in beside),
        part_nbytes=part_nbytes,
        steps=tuple(
            nbytes if info.nbytes == nbytes * prod(lead) else 0
            for info, nbytes in zip(stored, part_nbytes, strict=True)
        ),
    )


def _why_not(info: TensorInfo, stem: str, tensors: Mapping[str, TensorInfo]) -> str:
    """What a weight of codes lacks."""
    what = f"{info.name} {info.dtype} {list(info.shape)}"
    for ending in REFUSED_ENDINGS:
        if f"{stem}{ending}" in tensors:
            return f"{what} has {ending[1:]}: only symmetric groups in order can be read"
    endings = sorted({s.ending for e in ENCODINGS for s in e.scales} | {"_weight_scale"})
    names = {ending: name_beside(stem, ending) for ending in endings}
    beside = {ending: tensors[name] for ending, name in names.items() if name in tensors}
    if not beside:
        return f"{what} has no scale beside it"
    found = ", ".join(f"{ending} {b.dtype} {list(b.shape)}" for ending, b in beside.items())
    return f"{what} with {found} is no quantization that this version reads"
