"""What the files of a checkpoint say of its quantization, and whether that can be read.

The tensors decide what a weight is stored as; what is said must agree, for there are ways to
quantize that change the weights beforehand and do not show in any name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import CheckpointError, Problems, show, show_some
from ..formats import find_format
from .checkpoint import Source
from .encodings import ENCODINGS
from .files import read_regular
from .strict_json import parse_object, show_value

__all__ = ["HF_QUANT_CONFIG", "Declared", "declarations", "everything_declared"]
__all__ += ["quantization_beside"]

HF_QUANT_CONFIG = "hf_quant_config.json"
_CAP_NBYTES = 30_000_000
_CONFIG_KEYS = ("quantization_config", "compression_config")

# quant_method -> the formats it may declare; methods that are not here are refused.
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
    "FP8 FP8_PER_CHANNEL_PER_TOKEN FP8_PB_WO MIXED_PRECISION MXFP8 NVFP4 W4A16_NVFP4".split()
)
# Kind and bits of the weights of compressed-tensors.
_NUMBERS = frozenset({("float", "4"), ("float", "8"), ("int", "4"), ("int", "8")})
_NOT_READ = {
    "sparsity_config": "sparse weights",
    "transform_config": "weights that are rotated",
}


@dataclass(frozen=True, slots=True)
class Declared:
    """What one place says, and where that is."""

    where: str
    said: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The quant_method; ModelOpt's is also written modelopt_fp4 and the like."""
        said = self.said.get("quant_method", "")
        method = said if isinstance(said, str) else show_value(said)
        if method.startswith("modelopt") or ("quant_algo" in self.said and not method):
            return "modelopt"
        return method or ("compressed-tensors" if "config_groups" in self.said else "")

    @property
    def has_kv_cache(self) -> bool:
        """Whether k and v are to be stored as FP8, with a static scale for each."""
        return self._kv_cache is True

    @property
    def unknown_kv_cache(self) -> str:
        """What to warn of a KV cache scheme of another kind; '' if there is none."""
        said = self._kv_cache
        if not said or said is True:
            return ""
        return f"{self.where}: KV cache scheme {show_value(said)} is not known and is left out"

    @property
    def _kv_cache(self) -> Any:
        scheme, algo = self.said.get("kv_cache_scheme"), self.said.get("kv_cache_quant_algo")
        if algo == "FP8":
            return True
        if not isinstance(scheme, dict):
            return algo or scheme
        number = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy", "tensor"))
        is_static = not scheme.get("dynamic") and scheme.get("symmetric", True)
        return True if is_static and number == (8, "float", "tensor") else scheme

    def refuse_unread(self, problems: Problems) -> None:
        """Report what is said of ways to quantize that cannot be read."""
        method, said = self.method, self.said.get("quant_method")
        if method not in _METHODS:
            problems.add(
                CheckpointError,
                f"{self.where}: quant_method {show_value(said)} cannot be read; known are "
                f"{', '.join(_METHODS)}. Start from the original release",
            )
            return
        block = self.said.get("weight_block_size")
        if block is not None and block not in ([128, 128], [1, 32]):
            problems.add(
                CheckpointError,
                f"{self.where}: weight_block_size is {show_value(block)}; only [128, 128] and MX's "
                "[1, 32] can be read",
            )
        for key, what in _NOT_READ.items():
            if self.said.get(key):
                problems.add(CheckpointError, f"{self.where}: {key}: {what} cannot be read")
        unknown = sorted(self._algos() - _ALGOS)
        if method == "modelopt" and unknown:
            problems.add(
                CheckpointError,
                f"{self.where}: quant_algo {show_some(unknown)} cannot be read; known are "
                f"{', '.join(sorted(_ALGOS))}. Start from the original release",
            )
        for name, number, is_plain in self._schemes():
            if not is_plain or number not in _NUMBERS:
                problems.add(
                    CheckpointError,
                    f"{self.where}: {show(name)}: weights of type {show(number[0])} and "
                    f"{show(number[1])} bits in this form cannot be read; known are symmetric "
                    "float and int of 4 bits, and of 8 bits that are not packed",
                )

    def refuse_contradictions(
        self, stored: Iterable[tuple[str, str, str]], problems: Problems
    ) -> None:
        """Report weights, each with its format and what that is called, that are not described."""
        allowed = _METHODS[self.method]
        numbers = {number for _, number, _ in self._schemes()}

        @cache
        def is_described(format_name: str) -> bool:
            is_allowed = format_name.replace("-w4a16", "") in allowed
            return is_allowed and (not numbers or _number_of(format_name) in numbers)

        wrong = [
            f"{name} ({what})"
            for name, format_name, what in stored
            if not is_described(format_name)
        ]
        if wrong:
            problems.add(
                CheckpointError,
                f"{self.where}: quant_method {self.method!r} does not describe {show_some(wrong)}",
            )

    def _algos(self) -> set[str]:
        """The names of ModelOpt's algorithms, those of single layers included."""
        layers = self.said.get("quantized_layers")
        entries = [self.said, *(layers.values() if isinstance(layers, dict) else ())]
        said = [entry.get("quant_algo") for entry in entries if isinstance(entry, Mapping)]
        return {str(algo).upper() for algo in said if algo}

    def _schemes(self) -> Iterator[tuple[str, tuple[str, str], bool]]:
        """What compressed-tensors says of the weights of each group: its name, kind and bits.

        And whether they are symmetric, and packed only if they are of 4 bits.
        """
        groups = self.said.get("config_groups")
        if self.method != "compressed-tensors" or not isinstance(groups, dict):
            return
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict):
                continue
            number = (str(weights.get("type", "int")), str(weights.get("num_bits", 8)))
            stored = group.get("format") or self.said.get("format")
            is_packed = stored == "pack-quantized" and number[0] == "int" and number[1] != "4"
            is_plain = weights.get("symmetric", True) is True and not is_packed
            yield f"config_groups.{name}", number, is_plain


def declarations(source: Source) -> list[Declared]:
    """What the files say, at every level of the config and beside it.

    Raises:
        CheckpointError: with all that is said of ways to quantize that cannot be read.
    """
    path = source.root / HF_QUANT_CONFIG
    text = read_regular(path, _CAP_NBYTES, CheckpointError) if path.exists() else None
    found = everything_declared(source.config, text)
    problems = Problems()
    for of in found:
        of.refuse_unread(problems)
    problems.check()
    return found


def everything_declared(config: Mapping[str, Any], beside: bytes | None) -> list[Declared]:
    """What a config says, and the text of hf_quant_config.json if there is one.

    Raises:
        CheckpointError: that text is no JSON.
    """
    found: list[Declared] = []

    def walk(level: Mapping[str, Any], path: str) -> None:
        for key, value in level.items():
            if key in _CONFIG_KEYS and value:
                said = value if isinstance(value, dict) else {"quant_method": value}
                found.append(Declared(f"config.json: {path}{key}", said))
            elif isinstance(value, dict):
                walk(value, f"{path}{key}.")

    walk(config, "")
    if beside is not None:
        said = quantization_beside(beside)
        if said is not None:
            found.append(Declared(HF_QUANT_CONFIG, {"quant_method": "modelopt", **said}))
    return found


def quantization_beside(text: bytes) -> dict[str, Any] | None:
    """What hf_quant_config.json holds of quantization; None if that is no object.

    Raises:
        CheckpointError: the text is no JSON.
    """
    said = parse_object(text, HF_QUANT_CONFIG, CheckpointError).get("quantization")
    return said if isinstance(said, dict) else None


def _number_of(format_name: str) -> tuple[str, str]:
    """Kind and bits of a format as compressed-tensors has them."""
    kind = "int" if format_name.startswith("int") else "float"
    return kind, str(find_format(format_name).weight_bits)
