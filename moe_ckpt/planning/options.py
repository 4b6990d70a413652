"""What a plan is asked for: the options, their defaults, and which do not fit together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from ..errors import UsageError, show
from ..formats import DEFAULT_FORMAT
from ..layouts import LAYOUTS, ORDERS
from .expert_form import EXPERTS
from .recipe import Recipe, built_in, read_recipe

__all__ = ["Limits", "Options", "PlanOptions", "parse_size"]

_MISSING_STATS = ("error", "constant")
_KV_CACHE = ("none", "fp8")
_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
_UNITS |= {"TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1, "": 1}

File = str | os.PathLike[str]


class PlanOptions(TypedDict, total=False):
    """Keywords of `make_plan` and `convert`; `Options` says what they mean."""

    stats: Iterable[File]
    format: str | None
    quantize: str | None
    recipe: File | None
    dialect: str | None
    kv_cache: str
    weight_amax: File | None
    allow_requantize: bool
    experts: str
    layout: str | None
    gate_up_order: str | None
    max_shard_size: str | int
    missing_stats: str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a plan.

    Attributes:
        stats: files of activation statistics, merged by maximum.
        format: name of a number format; "nvfp4" if neither it nor ``recipe`` is given.
        quantize: "experts" (if not given) for routed experts only, "linear" for all linear layers.
        recipe: a file that says which modules become which format, instead of the two.
        dialect: how the output is spelled; None for what most runtimes load.
        kv_cache: "fp8" to write scales for an FP8 KV cache, from the statistics; "none".
        weight_amax: the file of a scan of the same checkpoint; saves a pass over the weights.
        allow_requantize: whether 4-bit weights may be rounded again to another 4-bit format.
        experts: "split" for a matrix per expert, "fused" for ModelOpt's fused export, "auto" for
            what most runtimes read.
        layout: how the source stores experts, one of `moe_ckpt.layouts.LAYOUTS`, for what headers
            and model type leave open.
        gate_up_order: "concat" or "interleaved", the same.
        max_shard_size: bytes of tensors in one output file, or text such as "5GB".
        missing_stats: "error", or "constant" for input scale 1.0 where statistics are missing.

    Raises:
        UsageError: an option that is unknown, or two that do not fit together.
    """

    stats: Iterable[File] = ()
    format: str | None = None
    quantize: str | None = None
    recipe: File | None = None
    dialect: str | None = None
    kv_cache: str = "none"
    weight_amax: File | None = None
    allow_requantize: bool = False
    experts: str = "auto"
    layout: str | None = None
    gate_up_order: str | None = None
    max_shard_size: str | int = "5GB"
    missing_stats: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", tuple(os.fspath(file) for file in self.stats))
        _check_choice("--experts", self.experts, EXPERTS)
        _check_choice("--layout", self.layout, (None, *LAYOUTS))
        _check_choice("--gate-up-order", self.gate_up_order, (None, *ORDERS))
        _check_choice("--missing-stats", self.missing_stats, _MISSING_STATS)
        _check_choice("--kv-cache", self.kv_cache, _KV_CACHE)
        if self.recipe is not None and (self.format is not None or self.quantize is not None):
            raise UsageError("--recipe says what --format and --quantize say; give it alone")
        if self.kv_cache == "fp8" and not self.stats_files:
            raise UsageError("--kv-cache fp8 takes its scales from statistics; give --stats FILE")
        parse_size(self.max_shard_size)

    @property
    def stats_files(self) -> tuple[str, ...]:
        """The files of statistics."""
        return tuple(os.fspath(file) for file in self.stats)

    def read_recipe(self) -> Recipe:
        """The recipe of the file, or the one that format and quantize stand for."""
        if self.recipe is not None:
            return read_recipe(self.recipe)
        return built_in(self.quantize or "experts", self.format or DEFAULT_FORMAT)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a conversion may use of a machine.

    ``workers``: threads; None for one per core, at most 16, or 8 with CUDA. ``memory`` and
    ``device_memory``: all buffers together, on the host and on the GPU, beside the program itself;
    bytes, or text such as "256MiB". A matrix that must be gathered before it is written may need
    more.

    Raises:
        UsageError: one is not such a size, or ``workers`` is below 1.
    """

    workers: int | None = None
    memory: str | int = "256MiB"
    device_memory: str | int = "2GiB"

    def __post_init__(self) -> None:
        parse_size(self.memory)
        parse_size(self.device_memory)
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {show(self.workers)}: expected 1 or more")


def parse_size(size: str | int) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``512MiB``.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", str(size).strip().upper())
    nbytes = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if not 1 <= nbytes < 2**63:
        raise UsageError(f"size {show(size)!r} is not a number of bytes such as 5GB or 512MiB")
    return int(nbytes)


def _check_choice(option: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        words = ", ".join(word for word in known if word is not None)
        raise UsageError(f"{option} {show(value)!r} is unknown; choose {words}")
