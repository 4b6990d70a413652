"""What a plan is made of: a source that was found sound, and what is asked of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dialects import Dialect, dialect_for
from ..errors import LayoutError, Problems, UsageError
from ..formats import find_format
from ..layouts import Detection, Given, detect
from ..layouts.config_keys import CompletedConfig, complete_config
from ..layouts.missing import Lack, what_is_missing
from ..layouts.opening import open_released
from ..layouts.unwrapping import Changes, without_wrappers
from ..source.checkpoint import Source
from ..source.weights import Weights, weights_of
from .amax_file import read_amax
from .expert_form import form_of_experts
from .options import Options
from .recipe import Recipe
from .stats import Stats, read_stats

__all__ = ["Task", "read_task"]


@dataclass(frozen=True, slots=True)
class Task:
    """A source and what is asked of it.

    ``source`` has the names of the release, by ``changes`` of the beginnings of others.
    ``completed``: its config with the keys that runtimes ask for. ``lacks``: what the model is
    without, as people may mean it to be. ``form``: how experts are written.
    """

    source: Source
    weights: Weights
    detection: Detection
    changes: Changes
    completed: CompletedConfig
    lacks: Sequence[Lack]
    asked: Options
    recipe: Recipe
    dialect: Dialect
    form: str

    @property
    def lacks_stats(self) -> bool:
        """Whether a format has static input scales and no statistics were given."""
        wants = any(find_format(name).input_scale for name in self.recipe.formats)
        return wants and not self.asked.stats_files

    @property
    def carries_input_scales(self) -> bool:
        """Whether the source is quantized with static input scales."""
        return any(of.has_input_scale for of in self.weights.all_encoded())


def read_task(
    in_dir: str | os.PathLike[str], asked: Options
) -> tuple[Task, Stats | None, Mapping[str, float]]:
    """Read headers, config, recipe, statistics and weight amax.

    Raises:
        UsageError: options that do not fit together.
        InputError: with every problem in them.
    """
    recipe = asked.read_recipe()
    dialect = dialect_for(recipe.formats, asked.dialect)
    unwrapped = open_released(in_dir)
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
    assert amax is not None
    lacks = _refuse_incomplete(weights, detection, source.config, problems)
    problems.check()
    task = Task(
        source=source,
        weights=weights,
        detection=detection,
        changes=unwrapped.changes,
        completed=complete_config(source.config, weights.tensors.keys()),
        lacks=lacks,
        asked=asked,
        recipe=recipe,
        dialect=dialect,
        form=form_of_experts(detection, asked.experts, recipe.formats, dialect),
    )
    return task, stats, amax


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
