"""What a plan has to say beside its tensors: notes, and warnings by kind."""

from __future__ import annotations

from collections.abc import Mapping

from ..dialects.config import CONFIG, said_of
from ..errors import show, show_some
from ..formats import UNQUANTIZED
from ..layouts.missing import PARTIAL
from .assignment import Assigned
from .calibration import Calibration
from .task import Task

__all__ = ["file_warnings", "layer_warnings", "notes_on", "stats_warnings"]


def notes_on(
    task: Task,
    calibration: Calibration | None,
    assigned: Assigned,
    formats: Mapping[str, int],
) -> tuple[str, ...]:
    """What was done with the source that the user may not expect.

    ``formats``: how many matrices become each.
    """
    files = task.asked.stats_files
    notes = [*task.source.notes, *(calibration.stats.notes if calibration else ())]
    notes += task.completed.notes
    if task.lacks_stats and task.carries_input_scales:
        notes.append(
            "no statistics: quantized modules keep the input scales of the source, those "
            "without one get input scale 1.0"
        )
    if files and calibration is None:
        notes.append(
            f"format {', '.join(task.recipe.formats)} has no input scales: statistics are not used"
        )
    if task.detection.renamed:
        example = next(iter(task.detection.renamed.values()))
        notes.append(
            f"{len(task.detection.renamed)} tensors that transformers renamed get back the "
            f"names that runtimes read, such as {show(example)}"
        )
    for name, count in task.weights.encodings.items():
        notes.append(f"the source is quantized: {count:,} weights as {name}")
    decoded = [name for name, chosen in assigned.stays.items() if chosen == UNQUANTIZED]
    if decoded and formats.keys() != {UNQUANTIZED}:
        notes.append(
            f"{len(decoded)} weights that are not asked for are decoded to bf16, for "
            f"{task.dialect.name} cannot say what they are: {show_some(decoded)}"
        )
    said = said_of(task.source.config, "scale_fmt")
    if said and "scale_fmt" not in assigned.files[CONFIG] and formats.keys() != {UNQUANTIZED}:
        notes.append(
            f"scale_fmt {show(said)} of the source is left out: it is true of the source's own "
            "scales only"
        )
    if task.weights.kv_cache and not task.dialect.kv_scales:
        notes.append(
            f"dialect {task.dialect.name} has no FP8 KV cache: the source's scheme and its "
            "scales are left out"
        )
    notes += [str(lack) for lack in task.lacks if lack.kind == PARTIAL]
    return tuple(notes)


def file_warnings(task: Task) -> tuple[str, ...]:
    """What the user should know of the files of the source."""
    source = task.source
    strays = f"left out, the index does not name it: {show_some(source.strays)}"
    return (
        *([strays] if source.strays else []),
        *source.warnings,
        *task.weights.warnings,
        *task.completed.warnings,
    )


def layer_warnings(task: Task) -> tuple[str, ...]:
    """What the user should know of the layers of the model."""
    lacks = (str(lack) for lack in task.lacks if lack.kind != PARTIAL)
    return (*task.detection.warnings, *lacks)


def stats_warnings(task: Task, calibration: Calibration | None) -> tuple[str, ...]:
    """What the user should know of the statistics."""
    if task.lacks_stats and not task.carries_input_scales:
        return (
            "no statistics: every quantized module gets input scale 1.0, whatever its "
            "activations are; statistics of your data (convert --stats) are more accurate",
        )
    return calibration.warnings(task.weights.tensors) if calibration else ()
