"""What the files of a checkpoint say of its quantization, and whether that can be read.

The tensors decide what a weight is stored as; what is said must agree, for there are ways to
quantize that change the weights beforehand and do not show in any name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..dialects.config import EXPERT_DTYPE, HF_QUANT_CONFIG
from ..dialects.dialect import COMPRESSED_TENSORS, FP8, MODELOPT
from ..dialects.fp8.table import BLOCKS
from ..dialects.methods import METHODS
from ..dialects.others import OWN_TENSORS, UNREAD_METHODS
from ..errors import CheckpointError, Problems, show_some
from .checkpoint import Source
from .files import read_regular
from .strict_json import parse_object, show_value

__all__ = ["Declared", "declarations", "everything_declared"]
__all__ += ["quantization_beside"]

_CAP_NBYTES = 30_000_000
_CONFIG_KEYS = ("quantization_config", "compression_config")

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
        if method.startswith(MODELOPT) or ("quant_algo" in self.said and not method):
            return MODELOPT
        return method or (COMPRESSED_TENSORS if "config_groups" in self.said else "")

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

    def unread(self, *, is_read: bool) -> list[str]:
        """What is said of ways to quantize that runtimes know and nothing here reads.

        ``is_read``: whether all quantized weights are of forms that are read. Then words of forms
        whose tensors look otherwise are wrong, and not unread.
        """
        method = self.method
        if method not in METHODS:
            is_known = method in UNREAD_METHODS and not (is_read and method in OWN_TENSORS)
            return [f"quant_method {show_value(method)} cannot be read"] if is_known else []
        found = [f"{key}: {what} cannot be read" for key, what in self._beyond]
        if not (is_read and method == COMPRESSED_TENSORS):
            found += METHODS[method].unread(self.said)
        return found

    @property
    def _beyond(self) -> list[tuple[str, str]]:
        """What is done to weights besides, by its key."""
        return [
            (key, what)
            for key, what in _NOT_READ.items()
            if (said := self.said.get(key))
            and not (isinstance(said, dict) and said.get("format") == "dense")
        ]

    def refuse_unread(self, problems: Problems) -> None:
        """Report what is said of ways to quantize that cannot be read."""
        method, said = self.method, self.said.get("quant_method")
        if method not in METHODS:
            problems.add(
                CheckpointError,
                f"{self.where}: quant_method {show_value(said)} cannot be read; known are "
                f"{', '.join(METHODS)}. Start from the original release",
            )
            return
        block = self.said.get("weight_block_size")
        if block is not None and block not in [[*size] for size in BLOCKS]:
            problems.add(
                CheckpointError,
                f"{self.where}: weight_block_size is {show_value(block)}; only [128, 128] and MX's "
                "[1, 32] can be read",
            )
        for key, what in self._beyond:
            problems.add(CheckpointError, f"{self.where}: {key}: {what} cannot be read")
        for problem in METHODS[method].source_problems(self.said):
            problems.add(CheckpointError, f"{self.where}: {problem}")

    def refuse_contradictions(
        self, stored: Iterable[tuple[str, str, str]], problems: Problems
    ) -> None:
        """Report weights, each with its format and what that is called, that are not described."""
        method = METHODS[self.method]

        @cache
        def is_described(format_name: str) -> bool:
            return method.may_be(format_name, self.said)

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
                if EXPERT_DTYPE in level and said.get("quant_method") == FP8:
                    said = {EXPERT_DTYPE: level[EXPERT_DTYPE]} | said
                found.append(Declared(f"config.json: {path}{key}", said))
            elif isinstance(value, dict):
                walk(value, f"{path}{key}.")

    walk(config, "")
    if beside is not None:
        said = quantization_beside(beside)
        if said is not None:
            found.append(Declared(HF_QUANT_CONFIG, {"quant_method": MODELOPT, **said}))
    return found


def quantization_beside(text: bytes) -> dict[str, Any] | None:
    """What hf_quant_config.json holds of quantization; None if that is no object.

    Raises:
        CheckpointError: the text is no JSON.
    """
    said = parse_object(text, HF_QUANT_CONFIG, CheckpointError).get("quantization")
    return said if isinstance(said, dict) else None
