"""Scales of an FP8 KV cache, from what k_proj and v_proj put out in calibration."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from ..dialects import Dialect
from ..errors import LayoutError, Problems, UsageError, show_some
from ..formats.e4m3 import MAX as E4M3_MAX
from ..layouts import Detection
from ..layouts.roles import is_matrix, module_of, set_aside
from ..plan import OutTensor
from ..source.headers import TensorInfo
from .calibration import Calibration
from .shards import ConstantUnit, Unit

__all__ = ["JOINED", "KV_SCALES", "kv_cache_units", "other_scale", "scale_name", "scale_places"]

KV_SCALES = (".k_scale", ".v_scale")

# What q_proj, k_proj and v_proj are called as one; vLLM alone knows scales there.
JOINED = ("qkv_proj", "qkqkv_proj")
# Where runtimes know them: beside the projections, in the projection, or in all three as one.
_PLACE = re.compile(rf"(.+?)\.(?:(k_proj|v_proj|{'|'.join(JOINED)})\.)?([kv])_scale")

_SMALLEST_NORMAL = 2.0**-126


def scale_name(name: str, dialect: Dialect) -> str:
    """What the dialect calls a scale of the source's KV cache; other tensors keep their name.

    >>> from moe_ckpt.dialects import find_dialect
    >>> scale_name("model.layers.0.self_attn.k_scale", find_dialect("modelopt"))
    'model.layers.0.self_attn.k_proj.k_scale'
    """
    if dialect.kv_scales is None or not name.endswith(KV_SCALES):
        return name
    match = _PLACE.fullmatch(name)
    assert match is not None
    return f"{match[1]}.{dialect.kv_scales['kv'.index(match[3])]}"


def scale_places(name: str) -> tuple[str, ...]:
    """The names that a scale of a KV cache may have, of which ``name`` is one.

    >>> scale_places("a.k_scale")
    ('a.k_scale', 'a.k_proj.k_scale', 'a.qkv_proj.k_scale', 'a.qkqkv_proj.k_scale')
    """
    match = _PLACE.fullmatch(name)
    assert match is not None
    attention, one = match[1], match[3]
    places = ("", f"{one}_proj.", *(f"{place}." for place in JOINED))
    return tuple(f"{attention}.{place}{one}_scale" for place in places)


def other_scale(name: str) -> str:
    """The scale of v where ``name`` is that of k, and the other way round, in the same place.

    >>> other_scale("model.layers.0.self_attn.qkv_proj.k_scale")
    'model.layers.0.self_attn.qkv_proj.v_scale'
    >>> other_scale("model.layers.0.self_attn.k_proj.k_scale")
    'model.layers.0.self_attn.v_proj.v_scale'
    """
    match = _PLACE.fullmatch(name)
    assert match is not None
    attention, place, one = match.groups()
    other = "v" if one == "k" else "k"
    place = f"{other}_proj" if place == f"{one}_proj" else place
    return ".".join((attention, *([place] if place else []), f"{other}_scale"))


def kv_cache_units(
    tensors: Mapping[str, TensorInfo],
    detection: Detection,
    dialect: Dialect,
    calibration: Calibration | None,
    problems: Problems,
) -> list[tuple[str, Unit]]:
    """A scale for k and for v of every attention layer: float32, output amax / 448.

    Raises:
        UsageError: the dialect has no KV cache scheme.
    """
    if dialect.kv_scales is None:
        raise UsageError(
            f"--kv-cache fp8: dialect {dialect.name} has no KV cache scheme; choose --dialect "
            "modelopt or compressed-tensors"
        )
    assert calibration is not None
    units: list[tuple[str, Unit]] = []
    present = [name for name in tensors if name.endswith(KV_SCALES)]
    if present:
        problems.add(
            LayoutError,
            f"{show_some(present)}: the source has scales of the KV cache already; leave out "
            "--kv-cache, and they are carried over",
        )
        return []
    for name, info in tensors.items():
        parent, _, leaf = module_of(name).rpartition(".")
        if leaf != "k_proj" or not is_matrix(name, info.shape):
            continue
        if f"{parent}.v_proj.weight" not in tensors:
            continue
        if set_aside(name, detection.stacks, detection.num_layers):
            continue
        attention = module_of(detection.output_name(module_of(name)))
        for projection, suffix in zip(("k_proj", "v_proj"), dialect.kv_scales, strict=True):
            source = f"{parent}.{projection}"
            amax = calibration.output_amax(source, detection.output_name(source), problems)
            scale = max((amax or E4M3_MAX) / E4M3_MAX, _SMALLEST_NORMAL)
            tensor = OutTensor(f"{attention}.{suffix}", "F32", dialect.scalar_shape)
            units.append((name, ConstantUnit(tensor, struct.pack("<f", scale))))
    if not units:
        problems.add(
            LayoutError,
            "--kv-cache fp8: the model has no attention with k_proj and v_proj; leave it out",
        )
    return units
