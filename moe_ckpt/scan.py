"""Find the largest magnitude of every weight once, for several conversions."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .dtypes import FLOATS
from .engines import Backend
from .errors import OutputRefusedError, Problems, show
from .faults import environment_faults
from .layouts import Detection, Given, detect
from .layouts.opening import open_released
from .layouts.places import expert_modules, place_of_experts, place_of_linears
from .layouts.roles import is_matrix, module_of
from .limits import Limits
from .output.durable import publish, replace, write_new
from .planning.amax_file import amax_text, source_digest
from .source.stored import Place
from .source.weights import Weights, weights_of
from .work.batches import Batch, batches, budget_for
from .work.pool import pool_over
from .work.worker import Worker

__all__ = ["scan"]

# The output modules of each slab of a place.
Names = tuple[tuple[str, ...], ...]


def scan(
    in_dir: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    *,
    backend: Backend,
    limits: Limits | None = None,
    layout: str | None = None,
    gate_up_order: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the amax of routed experts and of all linear layers of a checkpoint to a file.

    Args:
        in_dir: a checkpoint folder.
        out_file: the file, for `convert`'s ``weight_amax``.
        backend: where to compute; it changes no number.
        limits: threads and memory; they change none either.
        layout: see `make_plan`.
        gate_up_order: see `make_plan`.
        overwrite: replace the file if it is there.
        progress: called with bytes read.

    Returns:
        How many modules have an amax now.

    Raises:
        InputError: the checkpoint cannot be converted, or a weight is NaN or infinite.
        OutputRefusedError: the file is there already, or would lie in the checkpoint.
        EnvironmentFaultError: disk, memory or GPU failed.
    """
    path = Path(out_file)
    _check_out_file(path, Path(in_dir), overwrite=overwrite)
    source = open_released(in_dir).source
    weights = weights_of(source)
    found = detect(weights.tensors, source.config, Given(layout, gate_up_order))
    places = list(_places(weights, found))
    modules: dict[str, float] = {}
    budget = budget_for(backend, limits or Limits())

    def done(made: tuple[Batch, Names, list[float]]) -> None:
        batch, names, amax = made
        for of_slab, value in zip(names[batch.start : batch.stop], amax, strict=True):
            modules.update(dict.fromkeys(of_slab, value))
        if progress:
            progress(batch.nbytes)

    def tasks() -> Iterator[Callable[[Worker], tuple[Batch, Names, list[float]]]]:
        for place, names in places:
            for batch in batches(place, budget):
                yield partial(_amax, batch=batch, names=names)

    with environment_faults():
        with pool_over(source.shards.values(), backend, budget) as pool:
            pool.run(tasks(), done)
        text = amax_text(source_digest(source), dict(sorted(modules.items())))
        partial_file = path.with_name(f"moe-ckpt-{secrets.token_hex(8)}.partial")
        try:
            write_new(partial_file, [text.encode()])
            (replace if overwrite else publish)(partial_file, path)
        except FileExistsError:
            raise _is_there(path) from None
        finally:
            partial_file.unlink(missing_ok=True)
    return len(modules)


def _check_out_file(path: Path, in_dir: Path, *, overwrite: bool) -> None:
    """Refuse what would be found out only after everything was read, and what is not a file."""
    with environment_faults():
        there = path.exists()
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputRefusedError(f"{show(path)}: no file can be written there")
    if there and not path.is_file():
        raise OutputRefusedError(f"{show(path)}: is not a regular file; choose another place")
    if there and not overwrite:
        raise _is_there(path)
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(in_dir)):
        raise OutputRefusedError(f"{show(path)}: lies in the input; choose another place")


def _is_there(path: Path) -> OutputRefusedError:
    return OutputRefusedError(f"{show(path)}: is there already; pass --overwrite to replace it")


def _amax(worker: Worker, batch: Batch, names: Names) -> tuple[Batch, Names, list[float]]:
    return batch, names, worker.amax(batch)


def _places(weights: Weights, detection: Detection) -> Iterator[tuple[Place, Names]]:
    """Routed experts, and every other matrix by itself, with the output modules of each slab."""
    problems = Problems()
    for experts in detection.experts:
        for side in experts.sides:
            numbers = range(experts.num_experts)
            names = tuple(expert_modules(experts, side, expert) for expert in numbers)
            yield place_of_experts(weights, experts, side, problems), names
    consumed = {name for experts in detection.experts for name in experts.tensors}
    for name, info in weights.tensors.items():
        if name not in consumed and info.dtype in FLOATS and is_matrix(name, info.shape):
            module = detection.output_name(module_of(name))
            yield place_of_linears(weights, [name]), ((module,),)
    problems.check()
