"""Make the plan: source x layout x recipe x dialect x statistics -> every output tensor.

Each source tensor goes one way: it becomes matrices with its layer's experts, a linear layer of
some format, or is copied for a stated reason. Everything that can be refused is refused here, all
at once, before a byte of weights is read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from .amax_file import read_amax
from .assign import PLAIN, Assigned, assign, formats_of_experts
from .calibration import Calibration
from .checkpoint import Source, open_source
from .choice import Choice, choose, output_name
from .dialects import Dialect, dialect_for
from .errors import LayoutError, Problems, UsageError, show, show_some
from .formats import find_format
from .kv_cache import kv_cache_units
from .layouts import LAYOUTS, ORDERS, Detection, Given, detect
from .loaders import EXPERTS, form_of_experts, loader_warnings, loaders_of
from .packing import Unit, pack
from .plan import OutShard, Plan
from .recipe import RECIPE_FILE, Recipe, built_in, read_recipe, recipe_text
from .stats import Stats, read_stats
from .units import UnitMaker
from .weights import Weights, weights_of

__all__ = ["DEFAULT_FORMAT", "DEFAULT_SHARD_SIZE", "make_plan"]

DEFAULT_FORMAT = "nvfp4"
DEFAULT_QUANTIZE = "experts"
DEFAULT_SHARD_SIZE = "5GB"
MISSING_STATS = ("error", "constant")
KV_CACHE = ("none", "fp8")

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
_UNITS |= {"TIB": 2**40, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "B": 1, "": 1}


def make_plan(
    in_dir: str | os.PathLike[str],
    *,
    stats: Iterable[str | os.PathLike[str]] = (),
    format: str | None = None,
    quantize: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    dialect: str | None = None,
    kv_cache: str = "none",
    weight_amax: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
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
        format: name of a number format; "nvfp4" if neither it nor ``recipe`` is given.
        quantize: "experts" for routed experts only, "linear" for all linear layers.
        recipe: a file that says which modules become which format, instead of the two.
        dialect: how the output is spelled; None for what most runtimes load.
        kv_cache: "fp8" to write scales for an FP8 KV cache, from the statistics.
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
        UsageError: options that do not fit together.
        InputError: with every problem in the checkpoint, the recipe and the statistics.
    """
    stats_files = [os.fspath(file) for file in stats]
    _check_choice("--experts", experts, EXPERTS)
    _check_choice("--layout", layout, (None, *LAYOUTS))
    _check_choice("--gate-up-order", gate_up_order, (None, *ORDERS))
    _check_choice("--missing-stats", missing_stats, MISSING_STATS)
    _check_choice("--kv-cache", kv_cache, KV_CACHE)
    if recipe is not None and (format is not None or quantize is not None):
        raise UsageError("--recipe says what --format and --quantize say; give it alone")
    if kv_cache == "fp8" and not stats_files:
        raise UsageError("--kv-cache fp8 takes its scales from statistics; give --stats FILE")
    wanted = (
        read_recipe(recipe)
        if recipe is not None
        else built_in(quantize or DEFAULT_QUANTIZE, format or DEFAULT_FORMAT)
    )
    spelled = dialect_for(wanted.formats, dialect)
    max_nbytes = parse_size(max_shard_size)
    source = open_source(in_dir)
    weights = weights_of(source)
    _refuse_without_stats(wanted, weights, stats_files)
    problems = Problems()
    given = Given(layout, gate_up_order)
    detection = problems.catch(lambda: detect(weights.tensors, weights.config, given))
    read = problems.catch(lambda: read_stats(stats_files) if stats_files else None)
    amax = problems.catch(lambda: read_amax(weight_amax, source) if weight_amax else {})
    problems.check()
    assert detection is not None
    assert amax is not None
    form = form_of_experts(detection, experts, wanted.formats)
    planner = _Planner(source, weights, detection, wanted, spelled, form)
    return planner.plan(
        stats_files,
        read,
        amax,
        max_nbytes,
        missing_is_constant=missing_stats == "constant",
        may_requantize=allow_requantize,
        kv_cache=kv_cache == "fp8",
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


def _refuse_without_stats(recipe: Recipe, weights: Weights, stats_files: list[str]) -> None:
    """A format with static input scales needs statistics, or a source that has such scales."""
    for name in recipe.formats:
        row = find_format(name)
        in_source = any(name == of.format and of.has_input_scale for of in weights.all_encoded())
        if row.input_scale and not (row.constant_input_scale or stats_files or in_source):
            raise UsageError(
                f"format {name} has static input scales and needs --stats FILE; without "
                "statistics, use fp8-channel or fp8-block (dynamic activations), nvfp4-w4a16 "
                "(weights only) or nvfp4 (input scale 1.0)"
            )


class _Planner:
    """One run of `make_plan`, after the source is known to be sound."""

    def __init__(
        self,
        source: Source,
        weights: Weights,
        detection: Detection,
        recipe: Recipe,
        dialect: Dialect,
        form: str,
    ) -> None:
        self.form = form
        self.source = source
        self.weights = weights
        self.detection = detection
        self.recipe = recipe
        self.dialect = dialect
        self.problems = Problems()

    def plan(
        self,
        stats_files: list[str],
        stats: Stats | None,
        weight_amax: Mapping[str, float],
        max_nbytes: int,
        *,
        missing_is_constant: bool,
        may_requantize: bool,
        kv_cache: bool,
    ) -> Plan:
        source, detection, problems = self.source, self.detection, self.problems
        calibration = None
        if stats and (kv_cache or any(find_format(f).input_scale for f in self.recipe.formats)):
            calibration = Calibration(stats, detection, missing_is_constant)
        wishes = formats_of_experts(detection, self.recipe, problems)
        choice = choose(self.weights.tensors, detection, self.recipe, problems)
        problems.check()
        assigned = assign(
            self.weights,
            detection,
            choice,
            wishes,
            self.dialect,
            kv_cache=kv_cache or (self.weights.kv_cache and bool(self.dialect.kv_scales)),
        )
        make = UnitMaker(
            self.weights,
            detection,
            self.dialect,
            calibration,
            weight_amax,
            problems,
            may_requantize=may_requantize,
        )
        units = self._units(make, choice, assigned)
        if kv_cache:
            units += kv_cache_units(
                self.weights.tensors, detection, self.dialect, calibration, problems
            )
        problems.check()

        order = {name: position for position, name in enumerate(self.weights.tensors)}
        units.sort(key=lambda unit: order[unit[0]])
        shards = pack((unit for _, unit in units), self.dialect, max_nbytes)
        self._refuse_collisions(shards)
        formats = self._count(shards)
        of_experts = tuple(dict.fromkeys(assigned.experts))
        return Plan(
            root=source.root,
            model_type=detection.model_type,
            family=detection.family.name,
            loaders=loaders_of(detection, self.form, self.dialect, of_experts, tuple(formats)),
            formats=formats,
            dialect=self.dialect.name,
            experts_as=self.form,
            source_shards=tuple(source.shards.values()),
            source_nbytes=sum(info.nbytes for info in source.tensors.values()),
            num_parameters=sum(prod(info.shape) for info in self.weights.tensors.values()),
            experts=detection.experts,
            shards=tuple(shards),
            files={RECIPE_FILE: self._resolved(assigned), **assigned.files},
            side_files=source.side_files,
            left_out=source.left_out,
            stats_files=tuple(stats_files),
            stats_covered=calibration.covered if calibration else 0,
            notes=self._notes(stats_files, calibration, assigned, formats),
            warnings_by_kind={
                "files": (*source.warnings, *self.weights.warnings),
                "layers": detection.warnings,
                "loaders": loader_warnings(
                    detection, self.form, self.dialect, of_experts, tuple(formats)
                ),
                "statistics": calibration.warnings(self.weights.tensors) if calibration else (),
            },
        )

    def _units(self, make: UnitMaker, choice: Choice, assigned: Assigned) -> list[tuple[str, Unit]]:
        """All units, each with the source tensor that decides its place."""
        detection, tensors = self.detection, self.weights.tensors
        units: list[tuple[str, Unit]] = []
        for found, name in zip(detection.experts, assigned.experts, strict=True):
            target = find_format(name)
            is_fused = self.form == "fused" and name != PLAIN
            made = (make.of_fused_experts if is_fused else make.of_experts)(found, target)
            units += ((found.gate_up[0], unit) for unit in made)
        for group, name in choice.linears:
            linears = make.of_linears(group, find_format(name))
            units += ((f"{group[0]}.weight", unit) for unit in linears)
        for name, reason in choice.copies:
            if name in assigned.stays:
                target = find_format(assigned.stays[name])
                units += ((name, unit) for unit in make.of_stay(name, target))
            else:
                new = output_name(detection, name)
                units.append((name, make.of_copy(tensors[name], new, reason)))
        return units

    def _count(self, shards: Iterable[OutShard]) -> dict[str, int]:
        """How many matrices become each format, those in a stack counted one by one."""
        counts: Counter[str] = Counter()
        for shard in shards:
            for job in shard.jobs:
                if not job.is_stacked:
                    counts[job.format] += len(job.rows) * len(job.slabs)
                    continue
                gated = self.detection.family.is_gated
                joined = job.slabs[0].modules[0].rpartition(".")[2].startswith("gate_up")
                counts[job.format] += len(job.slabs) * (2 if gated and joined else 1)
        return dict(counts)

    def _resolved(self, assigned: Assigned) -> str:
        """The recipe that names every module."""
        made = assigned.assignment
        modules: dict[str, list[str]] = {}
        for name in made.formats:
            modules[name] = [found.module for found in made.experts.get(name, ())]
            modules[name] += made.linears.get(name, ())
        return recipe_text(modules)

    def _notes(
        self,
        files: list[str],
        calibration: Calibration | None,
        assigned: Assigned,
        formats: Mapping[str, int],
    ) -> tuple[str, ...]:
        notes = list(calibration.stats.notes) if calibration else []
        wants = [name for name in self.recipe.formats if find_format(name).input_scale]
        if wants and not files:
            carried = any(of.has_input_scale for of in self.weights.all_encoded())
            notes.append(
                "no statistics: quantized modules keep the input scales of the source, those "
                "without one get input_scale 1.0"
                if carried
                else "no statistics: every quantized module gets input_scale 1.0"
            )
        if files and calibration is None:
            notes.append(
                f"format {', '.join(self.recipe.formats)} has no input scales: statistics are not "
                "used"
            )
        if self.detection.renamed:
            example = next(iter(self.detection.renamed.values()))
            notes.append(
                f"{len(self.detection.renamed)} tensors that transformers renamed get back the "
                f"names that loaders read, such as {show(example)}"
            )
        for name, count in self.weights.encodings.items():
            notes.append(f"the source is quantized: {count:,} weights as {name}")
        decoded = [name for name, chosen in assigned.stays.items() if chosen == PLAIN]
        if decoded and formats.keys() != {PLAIN}:
            notes.append(
                f"{len(decoded)} weights that are not asked for are decoded to bf16, for "
                f"{self.dialect.name} cannot say what they are: {show_some(decoded)}"
            )
        if self.weights.kv_cache and not self.dialect.kv_scales:
            notes.append(f"dialect {self.dialect.name} has no FP8 KV cache: its scheme is left out")
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
