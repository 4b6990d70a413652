"""Scales that are stored as their reciprocal.

A global scale g of NVFP4 holds weights up to 2688 g, and an activation scale activations up to the
same or, of FP8, 448 times it. Models have weights up to about 1, activations up to about 100, with
outliers far above. A number is taken for a reciprocal if what it holds is far beyond that, or far
beyond half of its sisters, and what its inverse holds is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median_low

from ..formats import find_format
from ..verify.inventory import Module
from .draft import Draft, Mend, is_nvfp4

__all__ = ["invert_reciprocals"]

# What half of all scales of a kind hold, where they are sound: weights, activations.
_SOUND = {"global_scale": (1e-3, 1e3), "input_scale": (1e-2, 1e3)}
# How far beyond half of its sisters a single one is, and how near its inverse is then.
_FAR, _NEAR = 1e4, 100.0


def invert_reciprocals(draft: Draft) -> None:
    """Put the reciprocal where a scale of a matrix is one."""
    pools: dict[tuple[str, ...], list[Module]] = defaultdict(list)
    for module in draft.inventory.quantized:
        if is_nvfp4(module):
            pools["global_scale", "nvfp4"].append(module)
        if find_format(module.format).input_scale and len(module.shape) == 2:
            leaf = module.name.rpartition(".")[2]
            pools["input_scale", module.format, leaf].append(module)
    for (role, *_), modules in pools.items():
        _invert(draft, role, modules)


def _invert(draft: Draft, role: str, modules: Sequence[Module]) -> None:
    holds: dict[str, float] = {}
    for module in modules:
        scale = draft.scale(module, role)
        if scale is not None and not (role == "input_scale" and scale == 1):
            holds[module.name] = scale * _largest(module, role)
    if not holds:
        return
    least, most = _SOUND[role]
    usual = median_low(holds.values())
    for module in modules:
        if module.name not in holds:
            continue
        largest = _largest(module, role)
        held = holds[module.name]
        inverse = largest * largest / held
        if usual > most:
            is_reciprocal = held > most and least <= inverse <= most
        else:
            is_reciprocal = held > _FAR * usual and usual / _NEAR <= inverse <= usual * _NEAR
        info, stored = module.tensor(role), draft.stored(module, role)
        if is_reciprocal and info is not None and stored is not None:
            draft.put(info, 1 / stored)
            what = f"{stored:.6g}, its reciprocal, becomes {1 / stored:.6g}"
            draft.mends.append(Mend("reciprocal", info.name, what))


def _largest(module: Module, role: str) -> float:
    """What a scale of 1 holds."""
    row = find_format(module.format)
    return row.largest if role == "global_scale" or row.largest else 1.0
