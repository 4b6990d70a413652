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
from typing import Unpack

from ..errors import LayoutError, Problems, RecipeError, show
from ..formats import UNQUANTIZED, find_format
from ..layouts.names import unread_names
from ..layouts.roles import amax_groups
from ..layouts.wrappers import text_types_of
from ..limits import parse_size
from ..loaders.judge import verdicts_on
from ..loaders.loader import Written
from ..plan import OutShard, Plan
from ..source.checkpoint import RECIPE_FILE
from ..source.stored import Encoded
from .assignment import Assigned, assign, formats_of_experts
from .calibration import Calibration
from .choice import Choice, choose
from .expert_form import runtime_warnings
from .kv_cache import KV_SCALES, kv_cache_units, scale_name
from .options import Options, PlanOptions
from .provenance import origin_of
from .recipe import KEEP, recipe_text
from .remarks import file_warnings, layer_warnings, notes_on, stats_warnings
from .shards import Unit, pack
from .stats import Stats
from .task import Task, read_task
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
    task, stats, amax = read_task(in_dir, Options(**options))
    return _Planner(task).plan(stats, amax)


class _Planner:
    """One run of `make_plan`, after the source is known to be sound."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.form, self.asked = task.form, task.asked
        self.source, self.weights, self.detection = task.source, task.weights, task.detection
        self.recipe, self.dialect = task.recipe, task.dialect
        self.problems = Problems()

    def plan(self, stats: Stats | None, weight_amax: Mapping[str, float]) -> Plan:
        """The plan, from statistics and weight amax; raises `InputError` with all problems."""
        source, detection, problems = self.source, self.detection, self.problems
        calibration = None
        kv_cache = self.asked.kv_cache == "fp8"
        if stats and (kv_cache or any(find_format(f).input_scale for f in self.recipe.formats)):
            calibration = Calibration(
                stats, detection, self.asked.missing_stats == "constant", self.task.changes
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
            self.task.completed.config,
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
        verdicts = verdicts_on(self._written(assigned, choice))
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
            notes=notes_on(self.task, calibration, assigned, formats),
            warnings_by_kind={
                "files": file_warnings(self.task),
                "layers": layer_warnings(self.task),
                "runtimes": runtime_warnings(
                    detection, self.form, self.dialect, runtimes, tuple(formats), make.part_blocks
                ),
                "statistics": stats_warnings(self.task, calibration),
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

    def _written(self, assigned: Assigned, choice: Choice) -> Written:
        """What is written, as far as loaders look at it."""
        made = assigned.assignment
        is_plain = set(made.formats) <= {UNQUANTIZED}
        return Written(
            model_type=self.detection.model_type,
            text_types=text_types_of(self.source.config),
            family=self.detection.family,
            method="" if is_plain else self.dialect.name,
            is_fused=self.form == "fused",
            experts=tuple(dict.fromkeys(assigned.experts)),
            linears={name: made.linears[name] for name in made.linears if name != UNQUANTIZED},
            kept=made.kept,
            unread=unread_names(
                self.detection.family,
                [self.detection.output_name(name) for name, _ in choice.copies],
            ),
        )

    def _resolved(self, assigned: Assigned) -> str:
        """The recipe that names every module."""
        made = assigned.assignment
        modules: dict[str, list[str]] = {}
        for name in made.formats:
            modules[name] = [found.module for found in made.experts.get(name, ())]
            modules[name] += made.linears.get(name, ())
        return recipe_text(modules)

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
