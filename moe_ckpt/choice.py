"""What becomes of the tensors outside the routed experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dtypes import CODES, FLOATS
from .errors import CheckpointError, Problems, show_some
from .headers import TensorInfo
from .layouts import Detection
from .modules import amax_groups, is_matrix, module_of, reason_to_keep, set_aside

__all__ = ["Choice", "choose", "output_name"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Each tensor in one of two ways.

    ``linears``: groups of source modules that read the same input, to be quantized.
    ``copies``: source tensors to be copied, with the reason.
    ``kept``: output modules that runtimes must be told not to quantize.
    ``set_aside``: part of the model that is copied whole -> output modules in it.
    """

    linears: tuple[tuple[str, ...], ...]
    copies: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]
    set_aside: Mapping[str, Sequence[str]]


def output_name(detection: Detection, name: str) -> str:
    """The output name of a source tensor, or of a source module."""
    if name in detection.renamed:
        return detection.renamed[name]
    weight = detection.renamed.get(f"{name}.weight")
    return module_of(weight) if weight else name


def choose(
    tensors: Mapping[str, TensorInfo], detection: Detection, quantize: str, problems: Problems
) -> Choice:
    """Sort the tensors outside the experts; ``quantize`` is "experts" or "linear"."""
    consumed = {name for found in detection.experts for name in found.tensors}
    linears: list[tuple[str, int]] = []
    copies: list[tuple[str, str]] = []
    kept: list[str] = []
    aside: dict[str, list[str]] = {}
    coded: list[str] = []
    for name, info in tensors.items():
        if name in consumed:
            continue
        module = module_of(name)
        matrix = is_matrix(name, info.shape)
        if matrix and info.dtype in CODES:
            coded.append(f"{name} {info.dtype}")
        part = set_aside(name, detection.stacks, detection.num_layers)
        if part is not None:
            copies.append((name, part.reason))
            inside = aside.setdefault(part.prefix, [])
            if matrix:
                inside.append(output_name(detection, _without_expert(module)))
            continue
        reason = reason_to_keep(module) if matrix else "not a matrix"
        if reason is None and quantize == "linear" and info.dtype in FLOATS:
            linears.append((module, info.shape[1]))
            continue
        copies.append((name, reason or "not a routed expert"))
        if matrix and reason != "embedding":
            kept.append(output_name(detection, module))
    if coded:
        problems.add(
            CheckpointError,
            f"{show_some(coded)}: weights outside the experts are quantized already; this "
            "version converts BF16, F16 and F32 checkpoints",
        )
    return Choice(tuple(amax_groups(linears)), tuple(copies), tuple(kept), aside)


def _without_expert(module: str) -> str:
    """The experts of a layer as one module: runtimes must never be told of a single one."""
    return re.sub(r"\.experts\.\d+\..*", ".experts", module)
