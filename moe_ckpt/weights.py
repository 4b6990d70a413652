"""The weights of a source as matrices of numbers, whatever they are stored as.

A quantized weight is several tensors. Here they become one, of the shape that the weight has and
under the name that it would have, so that what follows (layouts, experts, linear layers) need not
know. Only where bytes are read do the tensors behind it count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from .announced import announcements
from .checkpoint import Source
from .dtypes import FLOATS, nbytes_of
from .encodings import ENCODINGS, SCALE_ENDINGS
from .errors import CheckpointError, Problems, show, show_some
from .formats import Part
from .headers import TensorInfo
from .layouts.packed import name_of_packing
from .plan import Encoded, Read

__all__ = ["Weights", "weights_of"]

_INPUT_ENDINGS = ("input_scale", "input_global_scale")
_CODES = frozenset({"F8_E4M3", "U8", "I8", "I32"})


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors behind a quantized weight of some shape, one for each part.

    ``beside``: their names without that of the codes, and what else belongs to them.
    """

    name: str
    encoded: Encoded
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    beside: tuple[str, ...]


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

    def encoded(self, name: str) -> Encoded:
        """How a weight is stored."""
        stored = self._stored.get(name)
        return stored.encoded if stored else plain(self.tensors[name].dtype)

    def reads(self, name: str, start: int = 0, count: int | None = None) -> tuple[Read, ...]:
        """The bytes of ``count`` weights of a tensor, from weight ``start`` on, for each part.

        Of a quantized tensor they are whole matrices [N, K].
        """
        info = self.tensors[name]
        stored = self._stored.get(name)
        if stored is None:
            skip = nbytes_of(info.dtype, (start,))
            nbytes = info.nbytes if count is None else nbytes_of(info.dtype, (count,))
            return (Read(info.shard, info.offset + skip, nbytes),)
        n, k = info.shape[-2:]
        first, matrices = start // (n * k), (info.shape[0] if len(info.shape) == 3 else 1)
        if count is not None:
            matrices = count // (n * k)
        found = []
        for part, tensor in zip(stored.encoded.parts, stored.infos, strict=True):
            nbytes = nbytes_of(part.dtype, part.shape(n, k))
            found.append(Read(tensor.shard, tensor.offset + first * nbytes, matrices * nbytes))
        return tuple(found)

    def all_encoded(self) -> set[Encoded]:
        """The ways in which quantized weights are stored."""
        return {stored.encoded for stored in self._stored.values()}

    def what_is(self, name: str) -> str:
        """What a tensor is stored as, for people; '' if it is not quantized."""
        stored = self._stored.get(name)
        return stored.name if stored else ""


def plain(dtype: str) -> Encoded:
    """Weights that are stored as they are."""
    return Encoded("bf16", (Part("qweight", dtype, 1),))


def weights_of(source: Source) -> Weights:
    """The weights of a source.

    Raises:
        CheckpointError: with every quantized weight that cannot be read, and why.
    """
    announced = announcements(source)
    problems = Problems()
    stored = _stored_weights(source.tensors, problems)
    problems.check()
    names = {of.infos[0].name: name for name, of in stored.items()}
    beside = {name for of in stored.values() for name in of.beside}
    orphans = [
        name
        for name in source.tensors
        if name not in beside and name not in names and name.endswith(SCALE_ENDINGS)
    ]
    if orphans:
        problems.add(
            CheckpointError,
            f"{show_some(orphans)}: belongs to no quantized weight; the checkpoint is incomplete, "
            f"or quantized in a way that this version does not know{_seems(source.tensors)}",
        )
    for of in announced:
        of.refuse_contradictions(
            ((name, found.encoded.format, found.name) for name, found in stored.items()), problems
        )
    problems.check()
    tensors = {}
    for name, info in source.tensors.items():
        if name in names:
            found = stored[names[name]]
            tensors[names[name]] = TensorInfo(
                names[name], "F32", found.shape, info.shard, info.offset, info.nbytes
            )
        elif name not in beside:
            tensors[name] = info
    warnings = [of.unknown_kv_cache for of in announced if of.unknown_kv_cache]
    if announced and not stored:
        warnings.append(
            f"{announced[0].where} says that the weights are quantized, and none is; what it says "
            "is replaced"
        )
    return Weights(
        tensors=tensors,
        encodings=Counter(of.name for of in stored.values()),
        kv_cache=any(of.has_kv_cache for of in announced),
        warnings=tuple(warnings),
        _stored=stored,
    )


def _stored_weights(tensors: Mapping[str, TensorInfo], problems: Problems) -> dict[str, _Stored]:
    """The quantized weights, by the names they would have if they were not."""
    found: dict[str, _Stored] = {}
    unread: list[str] = []
    for info in tensors.values():
        stem = _stem(info) if info.dtype in _CODES else None
        if stem is None:
            continue
        match = _match(info, stem, tensors)
        if match is None:
            unread.append(_why_not(info, stem, tensors))
            continue
        name = info.name if info.name.endswith("_blocks") else stem
        if name in found or (name != info.name and name in tensors):
            problems.add(
                CheckpointError,
                f"{show(name)}: is stored twice, also as {show(info.name)}; which of them counts "
                "cannot be told",
            )
        found[name] = match
    if unread:
        problems.add(CheckpointError, f"{show_some(unread)}{_seems(tensors)}")
    return found


def _seems(tensors: Mapping[str, TensorInfo]) -> str:
    """What packed the weights, for the end of a message; '' if nothing known did."""
    packing = name_of_packing({name: info.dtype for name, info in tensors.items()})
    return f"; it seems to be packed as {packing}" if packing else ""


def _stem(info: TensorInfo) -> str | None:
    """The name of the weight that these could be the codes of; None if they cannot."""
    if len(info.shape) < 2:
        return None
    name = info.name
    for ending in ("_packed", "_blocks"):
        if name.endswith((f"weight{ending}", f"_proj{ending}")):
            return name.removesuffix(ending)
    return name if _is_weight(info) else None


def _is_weight(info: TensorInfo) -> bool:
    """Whether a tensor of codes is a weight by its name, or a stack of experts."""
    if info.name.endswith(".weight") and len(info.shape) == 2:
        return True
    return len(info.shape) == 3 and info.dtype == "F8_E4M3" and not info.name.endswith("_scale")


def _match(info: TensorInfo, stem: str, tensors: Mapping[str, TensorInfo]) -> _Stored | None:
    """The weight that these are the codes of, if it is stored in a way that can be read."""
    if f"{stem}_zero_point" in tensors or f"{stem}_g_idx" in tensors:
        return None
    for encoding in ENCODINGS:
        if info.name != f"{stem}{encoding.ending}":
            continue
        scales = encoding.find(info, stem, tensors)
        if scales is None:
            continue
        parts = [Part("qweight", info.dtype, encoding.columns)]
        parts += [
            scale.part(found.dtype) for scale, found in zip(encoding.scales, scales, strict=True)
        ]
        infos = [info, *scales]
        number_format = encoding.format
        module = stem.removesuffix("weight")
        beside = [f"{stem}_shape", *(f"{module}{e}" for e in _INPUT_ENDINGS if module != stem)]
        others = [name for name in beside if name in tensors]
        inputs = [tensors[name] for name in others if name.endswith(_INPUT_ENDINGS)]
        is_number = inputs and inputs[0].dtype in FLOATS and prod(inputs[0].shape) == 1
        if number_format in ("fp8-tensor", "nvfp4") and is_number:
            parts.append(Part("input_scale", inputs[0].dtype, 0))
            infos.append(inputs[0])
        elif number_format == "nvfp4":
            number_format = "nvfp4-w4a16"
        lead, n, k = encoding.sizes(info) or ((), 0, 0)
        return _Stored(
            name=encoding.name,
            encoded=Encoded(number_format, tuple(parts), encoding.inverse),
            shape=(*lead, n, k),
            infos=tuple(infos),
            beside=(*(of.name for of in infos[1:]), *others),
        )
    return None


def _why_not(info: TensorInfo, stem: str, tensors: Mapping[str, TensorInfo]) -> str:
    """What a weight of codes lacks."""
    what = f"{info.name} {info.dtype} {list(info.shape)}"
    for ending in ("_zero_point", "_g_idx"):
        if f"{stem}{ending}" in tensors:
            return f"{what} has {ending[1:]}: only symmetric groups in order can be read"
    endings = sorted({s.ending for e in ENCODINGS for s in e.scales} | {"_weight_scale"})
    beside = [tensors[f"{stem}{e}"] for e in endings if f"{stem}{e}" in tensors]
    if not beside:
        return f"{what} has no scale beside it"
    found = ", ".join(f"{b.name.removeprefix(stem)} {b.dtype} {list(b.shape)}" for b in beside)
    return f"{what} with {found} is no quantization that this version reads"
