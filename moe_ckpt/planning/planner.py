"""Make the plan: source x layout x recipe x dialect x statistics -> every output tensor.

Each source tensor goes one way: it becomes matrices with its layer's experts, a linear layer of
some format, or is copied for a stated reason. Everything that can be refused is refused here, all
at once, before a byte of weights is read.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Unpack

from ..dialects import Dialect, dialect_for
from ..dialects.config import CONFIG, said_of
from ..errors import LayoutError, Problems, RecipeError, UsageError, show, show_some
from ..formats import UNQUANTIZED, find_format
from ..layouts import Detection, Given, detect
from ..layouts.config_keys import complete_config
from ..layouts.missing import PARTIAL, Lack, what_is_missing
from ..layouts.roles import amax_groups
from ..layouts.strays import with_mtp_shards
from ..layouts.unwrapping import Changes, unwrap, without_wrappers
from ..limits import parse_size
from ..loaders.judge import verdicts_on
from ..loaders.loader import Written, text_types_of
from ..plan import OutShard, Plan
from ..source.checkpoint import RECIPE_FILE, Source, open_source
from ..source.stored import Encoded
from ..source.weights import Weights, weights_of
from .amax_file import read_amax
from .assignment import Assigned, assign, formats_of_experts
from .calibration import Calibration
from .choice import Choice, choose
from .expert_form import form_of_experts, runtime_warnings
from .kv_cache import KV_SCALES, kv_cache_units, scale_name
from .options import Options, PlanOptions
from .provenance import origin_of
from .recipe import KEEP, Recipe, recipe_text
from .shards import Unit, pack
from .stats import Stats, read_stats
from .units import UnitMaker

__all__ = ["make_plan"]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the search for reference cycles: a plan has none, and a million values to look at."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collector()
def make_plan(in_dir: str | os.PathLike[str], **options: Unpack[PlanOptions]) -> Plan:
    """Decide a conversion from headers, config and statistics; reads no weights.

    Args:
        in_dir: a checkpoint folder.
        options: those of `moe_ckpt.Options`.

    Raises:
        UsageError: options that do not fit together.
        InputError: with every problem in the checkpoint, the recipe and the statistics.
    """
    asked = Options(**options)
    recipe = asked.read_recipe()
    dialect = dialect_for(recipe.formats, asked.dialect)
    unwrapped = unwrap(with_mtp_shards(open_source(in_dir)))
    source = unwrapped.source
    weights = weights_of(source)
    _refuse_without_stats(recipe, weights, asked.stats_files)
    problems = Problems()
    given = Given(asked.layout, asked.gate_up_order)
    detection = problems.catch(lambda: detect(weights.tensors, source.config, given))
    files = asked.stats_files
    stats = problems.catch(lambda: read_stats(files, without_wrappers) if files else None)
    amax = problems.catch(lambda: read_amax(asked.weight_amax, source) if asked.weight_amax else {})
    problems.check()
    assert detection is not None
    lacks = _refuse_incomplete(weights, detection, source.config, problems)
    problems.check()
    assert amax is not None
    form = form_of_experts(detection, asked.experts, recipe.formats, dialect)
    changes = unwrapped.changes
    planner = _Planner(source, weights, detection, recipe, dialect, form, asked, changes, lacks)
    return planner.plan(stats, amax)


def _refuse_incomplete(
    weights: Weights, detection: Detection, config: Mapping[str, Any], problems: Problems
) -> list[Lack]:
    """Report what the model lacks; what people leave out on purpose is returned."""
    lacks = what_is_missing(weights.tensors, config, detection.family, detection.stacks)
    for lack in lacks:
        if not lack.may_be_meant:
            problems.add(
                LayoutError,
                f"{lack}; download the checkpoint again, or let config.json say what is there",
            )
    return [lack for lack in lacks if lack.may_be_meant]


def _refuse_without_stats(recipe: Recipe, weights: Weights, stats_files: Sequence[str]) -> None:
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
        asked: Options,
        changes: Changes,
        lacks: Sequence[Lack],
    ) -> None:
        self.form = form
        self.lacks = lacks
        self.asked = asked
        self.changes = changes
        self.source = source
        self.weights = weights
        self.detection = detection
        self.recipe = recipe
        self.dialect = dialect
        self.problems = Problems()
        self.completed = complete_config(source.config, weights.tensors.keys())

    def plan(self, stats: Stats | None, weight_amax: Mapping[str, float]) -> Plan:
        """The plan, from statistics and weight amax; raises `InputError` with all problems."""
        source, detection, problems = self.source, self.detection, self.problems
        calibration = None
        kv_cache = self.asked.kv_cache == "fp8"
        if stats and (kv_cache or any(find_format(f).input_scale for f in self.recipe.formats)):
            calibration = Calibration(
                stats, detection, self.asked.missing_stats == "constant", self.changes
            )
        wishes = formats_of_experts(detection, self.recipe, problems)
        choice = choose(
            self.weights.tensors, detection, self.recipe, problems, method=self.dialect.name
        )
        if not choice.linears and set(wishes) == {KEEP}:
            problems.add(
                RecipeError,
                f"{self.recipe.file}: keeps all that can be quantized in this model, so that "
                "nothing is left to do; let fewer modules match the rules that say keep",
            )
        problems.check()
        assigned = assign(
            self.completed.config,
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
            may_requantize=self.asked.allow_requantize,
            kept_dtypes=assigned.kept_dtypes,
        )
        units = self._units(make, choice, assigned)
        if kv_cache:
            units += kv_cache_units(
                self.weights.tensors, detection, self.dialect, calibration, problems
            )
        problems.check()

        order = {name: position for position, name in enumerate(self.weights.tensors)}
        units.sort(key=lambda unit: order[unit[0]])
        shards = pack(
            (unit for _, unit in units), self.dialect, parse_size(self.asked.max_shard_size)
        )
        self._refuse_collisions(shards)
        formats = self._count(choice, assigned)
        verdicts = verdicts_on(self._written(assigned))
        runtimes = tuple(verdict.runtime for verdict in verdicts if verdict.loads)
        return Plan(
            root=source.root,
            model_type=detection.model_type,
            family=detection.family.name,
            verdicts=verdicts,
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
            stats_files=self.asked.stats_files,
            stats_covered=calibration.covered if calibration else 0,
            notes=self._notes(calibration, assigned, formats),
            warnings_by_kind={
                "files": (
                    *self._strays(),
                    *source.warnings,
                    *self.weights.warnings,
                    *self.completed.warnings,
                ),
                "layers": (
                    *detection.warnings,
                    *(str(lack) for lack in self.lacks if lack.kind != PARTIAL),
                ),
                "runtimes": runtime_warnings(
                    detection, self.form, self.dialect, runtimes, tuple(formats), make.part_blocks
                ),
                "statistics": self._stats_warnings(calibration),
            },
            origin=origin_of(self.asked, source),
        )

    def _units(self, make: UnitMaker, choice: Choice, assigned: Assigned) -> list[tuple[str, Unit]]:
        """All units, each with the source tensor that decides its place."""
        detection, tensors = self.detection, self.weights.tensors
        units: list[tuple[str, Unit]] = []
        for found, name in zip(detection.experts, assigned.experts, strict=True):
            target = find_format(name)
            of_experts = make.of_fused_experts if self.form == "fused" else make.of_experts
            made = of_experts(found, target)
            units += ((found.gate_up[0], unit) for unit in made)
        for group, name in choice.linears:
            linears = make.of_linears(group, find_format(name))
            units += ((f"{group[0]}.weight", unit) for unit in linears)
        for name, reason in choice.copies:
            if self._is_dropped(name):
                continue
            if name not in assigned.stays:
                new = scale_name(detection.output_name(name), self.dialect)
                units.append((name, make.of_copy(tensors[name], new, reason)))
        for names, name in self._stays(assigned):
            stays = make.of_stays(names, find_format(name))
            units += ((names[0], unit) for unit in stays)
        return units

    def _stays(self, assigned: Assigned) -> Iterator[tuple[tuple[str, ...], str]]:
        """Weights that stay and their format, those together that may have to share a scale."""
        alike: dict[tuple[str, Encoded], list[tuple[str, str, int]]] = {}
        for name, chosen in assigned.stays.items():
            if not self._is_dropped(name):
                columns = self.weights.tensors[name].shape[-1]
                kind = (chosen, self.weights.encoded(name))
                alike.setdefault(kind, []).append((name, name.removesuffix(".weight"), columns))
        for (chosen, _), found in alike.items():
            tensor_of = {module: name for name, module, _ in found}
            for group in amax_groups((module, columns) for _, module, columns in found):
                yield tuple(tensor_of[module] for module in group), chosen

    def _is_dropped(self, name: str) -> bool:
        """Whether a tensor is a scale of the source's KV cache that the dialect cannot declare."""
        dropped = self.weights.kv_cache and self.dialect.kv_scales is None
        return dropped and name.endswith(KV_SCALES)

    def _count(self, choice: Choice, assigned: Assigned) -> dict[str, int]:
        """How many matrices become each format, those of experts first."""
        counts: Counter[str] = Counter()
        for found, name in zip(self.detection.experts, assigned.experts, strict=True):
            counts[name] += found.num_experts * len(found.projections)
        for group, name in choice.linears:
            counts[name] += len(group)
        counts.update(assigned.stays.values())
        return dict(counts)

    def _written(self, assigned: Assigned) -> Written:
        """What is written, as far as loaders look at it."""
        made = assigned.assignment
        is_plain = set(made.formats) <= {UNQUANTIZED}
        return Written(
            model_type=self.detection.model_type,
            text_types=text_types_of(self.source.config),
            family=self.detection.family,
            method="" if is_plain else self.dialect.name,
            form=self.form,
            experts=tuple(dict.fromkeys(assigned.experts)),
            linears={name: made.linears[name] for name in made.linears if name != UNQUANTIZED},
            kept=made.kept,
        )

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
        calibration: Calibration | None,
        assigned: Assigned,
        formats: Mapping[str, int],
    ) -> tuple[str, ...]:
        files = self.asked.stats_files
        notes = [*self.source.notes, *(calibration.stats.notes if calibration else ())]
        notes += self.completed.notes
        if self._lacks_stats and self._carries_input_scales:
            notes.append(
                "no statistics: quantized modules keep the input scales of the source, those "
                "without one get input scale 1.0"
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
                f"names that runtimes read, such as {show(example)}"
            )
        for name, count in self.weights.encodings.items():
            notes.append(f"the source is quantized: {count:,} weights as {name}")
        decoded = [name for name, chosen in assigned.stays.items() if chosen == UNQUANTIZED]
        if decoded and formats.keys() != {UNQUANTIZED}:
            notes.append(
                f"{len(decoded)} weights that are not asked for are decoded to bf16, for "
                f"{self.dialect.name} cannot say what they are: {show_some(decoded)}"
            )
        said = said_of(self.source.config, "scale_fmt")
        if said and "scale_fmt" not in assigned.files[CONFIG] and formats.keys() != {UNQUANTIZED}:
            notes.append(
                f"scale_fmt {show(said)} of the source is left out: it is true of the source's own "
                "scales only"
            )
        if self.weights.kv_cache and not self.dialect.kv_scales:
            notes.append(
                f"dialect {self.dialect.name} has no FP8 KV cache: the source's scheme and its "
                "scales are left out"
            )
        notes += [str(lack) for lack in self.lacks if lack.kind == PARTIAL]
        return tuple(notes)

    @property
    def _lacks_stats(self) -> bool:
        """Whether a format has static input scales and no statistics were given."""
        wants = any(find_format(name).input_scale for name in self.recipe.formats)
        return wants and not self.asked.stats_files

    @property
    def _carries_input_scales(self) -> bool:
        return any(of.has_input_scale for of in self.weights.all_encoded())

    def _stats_warnings(self, calibration: Calibration | None) -> tuple[str, ...]:
        if self._lacks_stats and not self._carries_input_scales:
            return (
                "no statistics: every quantized module gets input scale 1.0, whatever its "
                "activations are; statistics of your data (convert --stats) are more accurate",
            )
        return calibration.warnings(self.weights.tensors) if calibration else ()

    def _strays(self) -> Iterator[str]:
        if self.source.strays:
            yield f"left out, the index does not name it: {show_some(self.source.strays)}"

    def _refuse_collisions(self, shards: Sequence[OutShard]) -> None:
        names = [tensor.name for shard in shards for tensor in shard.tensors]
        seen: set[str] = set()
        for name in names if len(set(names)) < len(names) else ():
            if name in seen:
                self.problems.add(
                    LayoutError,
                    f"{show(name)}: would be written twice; the source already holds a tensor of "
                    "this name",
                )
            seen.add(name)
        self.problems.check()
