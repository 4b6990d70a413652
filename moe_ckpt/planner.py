"""Make the plan: source x layout x format x dialect x statistics -> every output tensor.

Each source tensor goes one way: it is quantized with its layer's experts, quantized as a linear
layer, or copied for a stated reason. Everything that can be refused is refused here, all at
once, before a byte of weights is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from .calibration import Calibration
from .checkpoint import Source, open_source
from .choice import choose, output_name
from .dialects import config_files, tensor_name
from .dialects.exclude import exclude_list
from .errors import (
    CheckpointError,
    LayoutError,
    Problems,
    UsageError,
    show,
)
from .formats import QuantFormat, find_format
from .layouts import LAYOUTS, ORDERS, Detection, Given, detect
from .loaders import EXPERTS, form_of_experts, loader_warnings, loaders_of
from .packing import CopyUnit, QuantUnit, pack
from .plan import OutShard, Plan
from .stats import Stats, read_stats
from .units import UnitMaker

__all__ = ["DEFAULT_FORMAT", "DEFAULT_SHARD_SIZE", "QUANTIZE", "make_plan"]

DEFAULT_FORMAT = "nvfp4"
DEFAULT_SHARD_SIZE = "5GB"
QUANTIZE = ("experts", "linear")
MISSING_STATS = ("error", "constant")

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
_UNITS |= {"TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1, "": 1}


def make_plan(
    in_dir: str | os.PathLike[str],
    *,
    stats: Iterable[str | os.PathLike[str]] = (),
    format: str = DEFAULT_FORMAT,
    quantize: str = "experts",
    experts: str = "auto",
    layout: str | None = None,
    gate_up_order: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    missing_stats: str = "error",
) -> Plan:
    """Decide a conversion from headers, config and statistics; reads no weights.

    Args:
        in_dir: a checkpoint folder.
        stats: files of activation statistics, merged by maximum.
        format: name of a number format.
        quantize: "experts" for routed experts only, "linear" for all linear layers.
        experts: "split" for a matrix per expert, "fused" for ModelOpt's fused export, "auto" for
            what most runtimes read.
        layout: how the source stores experts, one of `moe_ckpt.layouts.LAYOUTS`, for what headers
            and model type leave open.
        gate_up_order: "concat" or "interleaved", the same.
        max_shard_size: bytes of tensors in one output file, or text such as "5GB".
        missing_stats: "error", or "constant" for input scale 1.0 where statistics are missing.

    Raises:
        UsageError: options that do not fit together.
        InputError: with every problem in the checkpoint and the statistics.
    """
    number_format = find_format(format)
    stats_files = [os.fspath(file) for file in stats]
    _check_choice("--quantize", quantize, QUANTIZE)
    _check_choice("--experts", experts, EXPERTS)
    _check_choice("--layout", layout, (None, *LAYOUTS))
    _check_choice("--gate-up-order", gate_up_order, (None, *ORDERS))
    _check_choice("--missing-stats", missing_stats, MISSING_STATS)
    if number_format.input_scale and not number_format.constant_input_scale and not stats_files:
        raise UsageError(
            f"format {format} has static input scales and needs --stats FILE; without "
            "statistics, use --format nvfp4-w4a16 (weights only) or nvfp4 (input scale 1.0)"
        )
    max_nbytes = parse_size(max_shard_size)
    source = open_source(in_dir)
    _refuse_quantized(source)
    problems = Problems()
    given = Given(layout, gate_up_order)
    detection = problems.catch(lambda: detect(source.tensors, source.config, given))
    read = problems.catch(lambda: read_stats(stats_files) if stats_files else None)
    problems.check()
    assert detection is not None
    form = form_of_experts(detection, experts)
    return _Planner(source, detection, number_format, quantize, form).plan(
        stats_files, read, missing_stats == "constant", max_nbytes
    )


def parse_size(size: str | int) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``512MiB``.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]*)", str(size).strip().upper())
    nbytes = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if nbytes < 1:
        raise UsageError(f"size {show(size)!r} is not a number of bytes such as 5GB or 512MiB")
    return nbytes


def _check_choice(option: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        words = ", ".join(word for word in known if word is not None)
        raise UsageError(f"{option} {show(value)!r} is unknown; choose {words}")


def _refuse_quantized(source: Source) -> None:
    for level in _levels(source.config):
        for key in ("quantization_config", "compression_config"):
            found = level.get(key)
            if found:
                raise _quantized(f"config.json: {key}", found)
    if (source.root / "hf_quant_config.json").exists():
        raise _quantized("hf_quant_config.json", {})


def _quantized(where: str, found: Any) -> CheckpointError:
    """What to say of a source that is quantized, with what its configuration calls the format."""
    keys = ("quant_method", "quant_algo", "format", "weight_block_size", "bits")
    said = found if isinstance(found, dict) else {"quant_method": found}
    words = ", ".join(f"{key} {show(said[key])}" for key in keys if said.get(key))
    return CheckpointError(
        f"{where} says that the weights are quantized already{f' ({words})' if words else ''}; "
        "this version converts BF16, F16 and F32: start from the original release"
    )


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)


class _Planner:
    """One run of `make_plan`, after the source is known to be sound."""

    def __init__(
        self,
        source: Source,
        detection: Detection,
        number_format: QuantFormat,
        quantize: str,
        form: str,
    ) -> None:
        self.form = form
        self.source = source
        self.detection = detection
        self.format = number_format
        self.quantize = quantize
        self.problems = Problems()

    def plan(
        self,
        stats_files: list[str],
        stats: Stats | None,
        missing_is_constant: bool,
        max_nbytes: int,
    ) -> Plan:
        source, detection = self.source, self.detection
        calibration = None
        if stats and self.format.input_scale:
            calibration = Calibration(stats, detection, missing_is_constant)
        choice = choose(source.tensors, detection, self.quantize, self.problems)
        make = UnitMaker(source.tensors, detection, self.format, calibration, self.problems)
        of_experts = make.of_fused_experts if self.form == "fused" else make.of_experts
        units: list[tuple[str, CopyUnit | QuantUnit]] = [
            (found.gate_up[0], unit) for found in detection.experts for unit in of_experts(found)
        ]
        units += (
            (f"{group[0]}.weight", unit)
            for group in choice.linears
            for unit in make.of_linears(group)
        )
        units += (
            (name, make.of_copy(source.tensors[name], output_name(detection, name), reason))
            for name, reason in choice.copies
        )
        self.problems.check()

        order = {name: position for position, name in enumerate(source.tensors)}
        units.sort(key=lambda unit: order[unit[0]])
        shards = pack(
            (unit for _, unit in units),
            self.format,
            partial(tensor_name, self.format.name),
            max_nbytes,
        )
        self._refuse_collisions(shards)

        quantized = list(dict.fromkeys(found.output for found in detection.experts))
        quantized += [output_name(detection, m) for group in choice.linears for m in group]
        kept = [*choice.kept, *self._built_as()]
        exclude = exclude_list(quantized, kept, choice.set_aside)
        return Plan(
            root=source.root,
            model_type=detection.model_type,
            family=detection.family.name,
            loaders=loaders_of(detection, self.form, self.format.name),
            format=self.format.name,
            quantize=self.quantize,
            experts_as=self.form,
            source_shards=tuple(source.shards.values()),
            source_nbytes=sum(info.nbytes for info in source.tensors.values()),
            num_parameters=sum(prod(info.shape) for info in source.tensors.values()),
            experts=detection.experts,
            shards=tuple(shards),
            files=config_files(source.config, self.format.name, exclude),
            side_files=source.side_files,
            left_out=source.left_out,
            stats_files=tuple(stats_files),
            stats_covered=calibration.covered if calibration else 0,
            notes=self._notes(stats_files, calibration),
            warnings_by_kind={
                "files": source.warnings,
                "layers": detection.warnings,
                "loaders": loader_warnings(detection, self.form, self.format.name),
                "statistics": calibration.warnings(source.tensors) if calibration else (),
            },
        )

    def _built_as(self) -> list[str]:
        """Routers that runtimes build under names of their own."""
        layers = {
            found.output.removesuffix(f".{self.detection.family.split}")
            for found in self.detection.experts
        }
        return [
            f"{layer}.{name}" for layer in sorted(layers) for name in self.detection.family.built_as
        ]

    def _notes(self, files: list[str], calibration: Calibration | None) -> tuple[str, ...]:
        notes = list(calibration.stats.notes) if calibration else []
        if self.format.input_scale and not files:
            notes.append("no statistics: every quantized module gets input_scale 1.0")
        if files and not self.format.input_scale:
            notes.append(f"format {self.format.name} has no input scales: statistics are not used")
        if self.detection.renamed:
            example = next(iter(self.detection.renamed.values()))
            notes.append(
                f"{len(self.detection.renamed)} tensors that transformers renamed get back the "
                f"names that loaders read, such as {show(example)}"
            )
        return tuple(notes)

    def _refuse_collisions(self, shards: Iterable[OutShard]) -> None:
        seen: set[str] = set()
        for shard in shards:
            for tensor in shard.tensors:
                if tensor.name in seen:
                    self.problems.add(
                        LayoutError,
                        f"{show(tensor.name)}: would be written twice; the source already holds a "
                        "tensor of this name",
                    )
                seen.add(tensor.name)
        self.problems.check()
