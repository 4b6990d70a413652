"""Activation scales that are missing, or no numbers above 0.

Runtimes use the largest of all experts of a layer, and the largest of linear layers that are parts
of one. So that is what one gets that has none, unless statistics say more: nothing changes for
the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..dialects.matching import built_modules
from ..dialects.read import read_config
from ..errors import Problems
from ..formats import find_format
from ..formats.scales import scale_of
from ..planning.calibration import Calibration
from ..source.encodings import input_name_of
from ..verify.config.inputs import bare_modules
from ..verify.config.modules import readings_by_runtime
from ..verify.inventory import LayerExperts, Module, expert_of, pairs_of
from .draft import Added, Draft, Mend

__all__ = ["give_activation_scales"]

_ROLE = "input_scale"


def give_activation_scales(draft: Draft, calibration: Calibration | None) -> None:
    """Give a scale to every module that lacks a sound one and is to have one."""
    bare = {module.name for modules in _said_to_have_one(draft) for module in modules}
    for name, experts in draft.inventory.experts.items():
        for side in _sides(experts):
            amax = _of_experts(calibration, name, side)
            _complete(draft, side, bare, amax)
    linears = draft.inventory.linears
    quantized = [name for name, module in linears.items() if module.is_quantized]
    for members in built_modules(quantized).values():
        _complete(
            draft,
            [linears[name] for name in members],
            bare,
            _of_linears(calibration, members),
        )


def _said_to_have_one(draft: Draft) -> Iterator[Sequence[Module]]:
    readings = {said.where: read_config(said.method, said.said) for said in draft.subject.said}
    return bare_modules(draft.inventory, readings_by_runtime(readings))


def _sides(experts: LayerExperts) -> Iterator[list[Module]]:
    """The matrices of all experts of a layer that read the same: gate and up, then down."""
    projections = experts.projections
    pairs = pairs_of(projections)
    joined = {projection for pair in pairs for projection in pair}
    for side in (*pairs, *((name,) for name in projections if name not in joined)):
        yield [
            module
            for _, matrices in sorted(experts.split.items())
            for name, module in matrices.items()
            if name in side and module.is_quantized
        ]


def _complete(draft: Draft, modules: Sequence[Module], bare: set[str], amax: float | None) -> None:
    """Give a scale to those of the modules that lack one.

    ``amax``: of the activations, if statistics say it.
    """
    sound: list[Module] = []
    others: list[Module] = []
    for module in modules:
        (others if draft.stored(module, _ROLE) is None else sound).append(module)
    lacking = [
        module
        for module in others
        if module.name in bare or sound or module.tensor(_ROLE) is not None
    ]
    if not lacking:
        return
    has_inverse = any(_ROLE in module.inverse for module in sound)
    scales = [scale for module in sound if (scale := draft.scale(module, _ROLE)) is not None]
    for module in lacking:
        whole = module.format.removesuffix("-w4a16")
        row = find_format(whole)
        if not row.input_scale or len(module.shape) != 2:
            continue
        leaf = input_name_of(module.what)
        info = module.tensor(_ROLE)
        name = info.name if info else f"{module.name}.{leaf}"
        if amax is not None:
            scale = float(scale_of(np.array([amax], np.float32), row.largest)[0])
        elif scales:
            scale = max(scales)
        else:
            draft.problems[name] = (
                "is missing, and no other of the layer has one; give --stats FILE, with the "
                "input_amax of the module or of its layer"
            )
            continue
        is_inverse = has_inverse or "global" in leaf
        number = float(np.float32(1 / scale if is_inverse else scale))
        source = "from statistics" if amax is not None else "the largest of its layer"
        if info is not None:
            draft.put(info, number)
        else:
            beside = next((i for other in sound if (i := other.tensor(_ROLE))), None)
            shape = beside.shape if beside else _scalar_shape(module)
            draft.added[name] = Added(module.parts[0][1], shape, number)
            draft.mended.add(name)
        draft.mends.append(Mend(_ROLE, name, f"becomes {number:.6g}, {source}"))


def _scalar_shape(module: Module) -> tuple[int, ...]:
    """The shape of the other scale that the matrix has as a whole."""
    info = module.tensor("global_scale")
    return info.shape if info else ()


def _of_experts(calibration: Calibration | None, name: str, side: Sequence[Module]) -> float | None:
    """The input amax of one side of a layer's experts."""
    if calibration is None or not side:
        return None
    wanted = {parts[2] for module in side if (parts := expert_of(module.name))}
    for found in calibration.detection.experts:
        for of_side in found.sides:
            if found.output == name and wanted <= {*of_side.projections}:
                return calibration.experts_amax(found, of_side.projections, Problems())
    return None


def _of_linears(calibration: Calibration | None, members: Sequence[str]) -> float | None:
    if calibration is None:
        return None
    names = [(name, calibration.detection.output_name(name)) for name in members]
    return calibration.linears_amax(names, Problems())
