"""The weights of a source as matrices of numbers, whatever they are stored as.

A quantized weight is several tensors. Here they become one, of the shape that the weight has and
under the name that it would have, so that what follows (layouts, experts, linear layers) need not
know. Only where bytes are read do the tensors behind it count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from .checkpoint import Source
from .dtypes import FLOATS, nbytes_of
from .encodings import ENCODINGS, SCALE_ENDINGS, Encoding
from .errors import CheckpointError, Problems, show, show_some
from .formats import Part, find_format
from .headers import TensorInfo
from .layouts.packed import name_of_packing
from .plan import Encoded, Read
from .regular import read_regular
from .strict_json import parse_object

__all__ = ["Weights", "weights_of"]

HF_QUANT_CONFIG = "hf_quant_config.json"
_CAP_NBYTES = 100_000_000
_CONFIG_KEYS = ("quantization_config", "compression_config")
_INPUT_ENDINGS = ("input_scale", "input_global_scale")
_CODES = frozenset({"F8_E4M3", "U8", "I8", "I32"})

# quant_method -> the formats it may announce; methods that are not here are refused.
_METHODS: Mapping[str, tuple[str, ...]] = {
    "fp8": ("fp8-block", "fp8-tensor", "fp8-channel", "mxfp8"),
    "fbgemm_fp8": ("fp8-channel",),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4",),
    "modelopt": ("nvfp4", "fp8-block", "fp8-tensor", "fp8-channel", "mxfp8"),
    "compressed-tensors": tuple(
        sorted({encoding.format for encoding in ENCODINGS if encoding.ending != "_blocks"})
    ),
}

# What ModelOpt calls what it does; others change the weights or the input as well (AWQ, SVDQuant).
_ALGOS = frozenset(
    (
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "MIXED_PRECISION",
        "MXFP8",
        "NVFP4",
        "W4A16_NVFP4",
    )
)
# Kind and bits of the weights of compressed-tensors.
_NUMBERS = frozenset({("float", "4"), ("float", "8"), ("int", "4"), ("int", "8")})
_NOT_READ = {
    "sparsity_config": "sparse weights",
    "transform_config": "weights that are rotated",
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors behind a quantized weight, one for each part."""

    name: str
    encoded: Encoded
    infos: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a source, each quantized weight as one.

    ``tensors``: a quantized weight has dtype F32, as which it is decoded. ``encodings``: what the
    quantized ones are stored as -> how many. ``kv_cache``: whether the source stores k and v as
    FP8. ``config``: the config without what it says of quantization.
    """

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
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
    problems = Problems()
    found_configs = _quantization_configs(source)
    for where, found in found_configs:
        _check_config(where, found, problems)
    problems.check()
    tensors: dict[str, TensorInfo] = {}
    stored: dict[str, _Stored] = {}
    beside: set[str] = set()
    scaleless: list[str] = []
    for info in source.tensors.values():
        if info.dtype not in _CODES:
            continue
        stem = _stem(info)
        if stem is None:
            continue
        match = _match(info, stem, source.tensors)
        if match is None:
            scaleless.append(_why_not(info, stem, source.tensors))
            continue
        encoding, encoded, infos, others = match
        name = f"{stem}_blocks" if encoding.ending == "_blocks" else stem
        if name in stored or (name != info.name and name in source.tensors):
            problems.add(
                CheckpointError,
                f"{show(name)}: is stored twice, also as {show(info.name)}; which of them counts "
                "cannot be told",
            )
            continue
        stored[name] = _Stored(encoding.name, encoded, infos)
        beside.update(other.name for other in infos[1:])
        beside.update(others)
        lead, n, k = encoding.sizes(info) or ((), 0, 0)
        beside.add(info.name)
        tensors[name] = TensorInfo(name, "F32", (*lead, n, k), info.shard, info.offset, info.nbytes)
    packing = name_of_packing({name: info.dtype for name, info in source.tensors.items()})
    seems = f"; it seems to be packed as {packing}" if packing else ""
    if scaleless:
        problems.add(CheckpointError, f"{show_some(scaleless)}{seems}")
    problems.check()
    orphans = [
        name
        for name, info in source.tensors.items()
        if name not in beside
        and name.endswith(SCALE_ENDINGS)
        and name not in stored
        and not _is_weight(info)
    ]
    if orphans:
        problems.add(
            CheckpointError,
            f"{show_some(orphans)}: belongs to no quantized weight; the checkpoint is incomplete, "
            f"or quantized in a way that this version does not know{seems}",
        )
    problems.check()
    counts = Counter(of.name for of in stored.values())
    _refuse_contradictions(found_configs, stored, problems)
    problems.check()
    ordered = {}
    by_code = {s.infos[0].name: name for name, s in stored.items()}
    for name, info in source.tensors.items():
        if name in by_code:
            ordered[by_code[name]] = tensors[by_code[name]]
        elif name not in beside:
            ordered[name] = info
    warnings = []
    if found_configs and not stored:
        warnings.append(
            f"{found_configs[0][0]} says that the weights are quantized, and none is; what it says "
            "is replaced"
        )
    kv_caches = {where: _kv_cache(found) for where, found in found_configs}
    warnings += [
        f"{where}: KV cache scheme {show(said)} is not known and is left out"
        for where, said in kv_caches.items()
        if said and said is not True
    ]
    return Weights(
        tensors=ordered,
        config=_without_quantization(source.config),
        encodings=counts,
        kv_cache=any(said is True for said in kv_caches.values()),
        warnings=tuple(warnings),
        _stored=stored,
    )


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


def _match(
    info: TensorInfo, stem: str, tensors: Mapping[str, TensorInfo]
) -> tuple[Encoding, Encoded, tuple[TensorInfo, ...], list[str]] | None:
    """The encoding of codes, its tensors, and the names of others that belong to it."""
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
        return (
            encoding,
            Encoded(number_format, tuple(parts), encoding.inverse),
            tuple(infos),
            others,
        )
    return None


def _why_not(info: TensorInfo, stem: str, tensors: Mapping[str, TensorInfo]) -> str:
    """What a weight of codes lacks."""
    what = f"{info.name} {info.dtype} {list(info.shape)}"
    for ending in ("_zero_point", "_g_idx"):
        if f"{stem}{ending}" in tensors:
            return f"{what} has {ending[1:]}: only symmetric groups in order can be read"
    endings = sorted({s.ending for e in ENCODINGS for s in e.scales})
    beside = [tensors[f"{stem}{e}"] for e in endings if f"{stem}{e}" in tensors]
    if not beside:
        return f"{what} has no scale beside it"
    found = ", ".join(f"{b.name.removeprefix(stem)} {b.dtype} {list(b.shape)}" for b in beside)
    return f"{what} with {found} is no quantization that this version reads"


def _quantization_configs(source: Source) -> list[tuple[str, Mapping[str, Any]]]:
    """What the files say of quantization, and where."""
    found: list[tuple[str, Mapping[str, Any]]] = []

    def walk(level: Mapping[str, Any], path: str) -> None:
        for key, value in level.items():
            if key in _CONFIG_KEYS and value:
                said = value if isinstance(value, dict) else {"quant_method": value}
                found.append((f"config.json: {path}{key}", said))
            elif isinstance(value, dict):
                walk(value, f"{path}{key}.")

    walk(source.config, "")
    path = source.root / HF_QUANT_CONFIG
    if path.exists():
        text = read_regular(path, _CAP_NBYTES, CheckpointError)
        said = parse_object(text, HF_QUANT_CONFIG, CheckpointError).get("quantization")
        if isinstance(said, dict):
            found.append((HF_QUANT_CONFIG, {"quant_method": "modelopt", **said}))
    return found


def _method(found: Mapping[str, Any]) -> str:
    """The quant_method; ModelOpt's is also written modelopt_fp4 and the like."""
    method = str(found.get("quant_method", ""))
    if method.startswith("modelopt") or ("quant_algo" in found and not method):
        return "modelopt"
    return method or ("compressed-tensors" if "config_groups" in found else "")


def _check_config(where: str, found: Mapping[str, Any], problems: Problems) -> None:
    method = _method(found)
    if method not in _METHODS:
        problems.add(
            CheckpointError,
            f"{where}: quant_method {show(method)!r} cannot be read; known are "
            f"{', '.join(_METHODS)}. Start from the original release",
        )
        return
    block = found.get("weight_block_size")
    if block is not None and block not in ([128, 128], [1, 32]):
        problems.add(
            CheckpointError,
            f"{where}: weight_block_size is {show(block)}; only [128, 128] and MX's [1, 32] can "
            "be read",
        )
    for key, what in _NOT_READ.items():
        if found.get(key):
            problems.add(CheckpointError, f"{where}: {key}: {what} cannot be read")
    unknown = sorted(_algos(found) - _ALGOS)
    if method == "modelopt" and unknown:
        problems.add(
            CheckpointError,
            f"{where}: quant_algo {show_some(unknown)} cannot be read; known are "
            f"{', '.join(sorted(_ALGOS))}. Start from the original release",
        )
    for name, number, is_plain in _schemes(found):
        if not is_plain or number not in _NUMBERS:
            problems.add(
                CheckpointError,
                f"{where}: {show(name)}: weights of type {show(number[0])} and {show(number[1])} "
                "bits in this form cannot be read; known are symmetric float and int of 4 bits, "
                "and of 8 bits that are not packed",
            )


def _algos(found: Mapping[str, Any]) -> set[str]:
    """The names of ModelOpt's algorithms, those of single layers included."""
    layers = found.get("quantized_layers")
    entries = [found, *(layers.values() if isinstance(layers, dict) else ())]
    said = [entry.get("quant_algo") for entry in entries if isinstance(entry, dict)]
    return {str(algo).upper() for algo in said if algo}


def _schemes(found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str], bool]]:
    """What compressed-tensors says of the weights of each group: its name, kind and bits.

    And whether they are symmetric, and packed only if they are of 4 bits.
    """
    groups = found.get("config_groups")
    if _method(found) != "compressed-tensors" or not isinstance(groups, dict):
        return
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        number = (str(weights.get("type", "int")), str(weights.get("num_bits", 8)))
        stored = group.get("format") or found.get("format")
        is_packed = stored == "pack-quantized" and number[0] == "int" and number[1] != "4"
        is_plain = weights.get("symmetric", True) is True and not is_packed
        yield f"config_groups.{name}", number, is_plain


def _number_of(format_name: str) -> tuple[str, str]:
    """Kind and bits of a format as compressed-tensors has them."""
    kind = "int" if format_name.startswith("int") else "float"
    return kind, str(find_format(format_name).weight_bits)


def _refuse_contradictions(
    configs: list[tuple[str, Mapping[str, Any]]], stored: Mapping[str, _Stored], problems: Problems
) -> None:
    """What the files say of quantization must fit what the tensors are."""
    for where, found in configs:
        allowed = _METHODS[_method(found)]
        wrong = [
            f"{name} ({s.name})"
            for name, s in stored.items()
            if s.encoded.format.replace("-w4a16", "") not in allowed
        ]
        numbers = {number for _, number, _ in _schemes(found)}
        if numbers:
            wrong += [
                f"{name} ({s.name})"
                for name, s in stored.items()
                if _number_of(s.encoded.format) not in numbers
            ]
        if wrong:
            problems.add(
                CheckpointError,
                f"{where}: quant_method {_method(found)!r} does not describe {show_some(wrong)}",
            )


def _kv_cache(found: Mapping[str, Any]) -> Any:
    """What is said of the KV cache: True for static FP8 with a scale for each of k and v."""
    scheme, algo = found.get("kv_cache_scheme"), found.get("kv_cache_quant_algo")
    if algo == "FP8":
        return True
    if not isinstance(scheme, dict):
        return algo or scheme
    number = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy", "tensor"))
    is_static = not scheme.get("dynamic") and scheme.get("symmetric", True)
    return True if is_static and number == (8, "float", "tensor") else scheme


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }
