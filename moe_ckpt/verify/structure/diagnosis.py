"""What is wrong with a quantized weight whose tensors fit no encoding."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from ...dtypes import FLOATS
from ...errors import show
from ...source.encodings import (
    ENCODINGS,
    REFUSED_ENDINGS,
    SHAPE_ENDINGS,
    Encoding,
    name_beside,
)
from ...source.headers import TensorInfo
from ..stacks import STACK_FORMS, StackForm

__all__ = ["Fault", "diagnose", "stem_of"]

_ENDINGS = tuple(
    dict.fromkeys(
        (
            *(scale.ending for encoding in ENCODINGS for scale in encoding.scales),
            *(encoding.ending for encoding in ENCODINGS if encoding.ending),
            *SHAPE_ENDINGS,
            *REFUSED_ENDINGS,
        )
    )
)
_ON_NAMES = sorted((e for e in _ENDINGS if not e.startswith(".")), key=len, reverse=True)
_OF_MODULES = [e.removeprefix(".") for e in _ENDINGS if e.startswith(".")]
_STEM = re.compile(rf"(.*(?:weight|_proj))({'|'.join(_ON_NAMES)})")
_MODULE_STEM = re.compile(rf"(.*\.)(?:{'|'.join(_OF_MODULES)})")
_STACK_ENDINGS = {ending: role for form in STACK_FORMS for role, ending, _, _ in form.scales}
_STACK_STEM = re.compile(rf"(.*\.experts\.[^.]+_proj)(?:{'|'.join(_STACK_ENDINGS)})?")


class Fault(NamedTuple):
    """A tensor that is missing, too many, or not what it must be."""

    tensor: str
    problem: str
    role: str
    is_missing: bool = False


def stem_of(tensor: str) -> str:
    """The name of the weight that a tensor of codes or scales belongs to.

    >>> stem_of("a.experts.0.up_proj.weight_scale_2"), stem_of("a.experts.up_proj_weight_scale")
    ('a.experts.0.up_proj.weight', 'a.experts.up_proj')
    """
    for pattern in (_STACK_STEM, _STEM):
        match = pattern.fullmatch(tensor)
        if match:
            return match[1]
    match = _MODULE_STEM.fullmatch(tensor)
    return f"{match[1]}weight" if match else tensor


def diagnose(stem: str, tensors: Mapping[str, TensorInfo], used: Iterable[str]) -> list[Fault]:
    """The fewest faults that explain why the tensors of a weight are no quantized weight.

    ``used``: names of the encodings that other weights of the checkpoint have; if there are any,
    only these are tried.
    """
    codes = tensors.get(stem)
    if codes is not None and codes.dtype in FLOATS and len(codes.shape) > 1:
        return [
            Fault(name, f"is left over: {show(stem)} is {codes.dtype}, not quantized", "leftover")
            for name in _beside(stem, tensors)
        ]
    if _STACK_STEM.fullmatch(stem):
        found = [_faults_of_stack(form, stem, tensors) for form in STACK_FORMS]
        found += [_faults(of, stem, tensors) for of in ENCODINGS if of.ending == "_blocks"]
        return min(found, key=len)
    known = set(used)
    tried = [encoding for encoding in ENCODINGS if not known or encoding.name in known]
    return min((_faults(encoding, stem, tensors) for encoding in tried), key=len)


def _beside(stem: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    of_stacks = [ending for ending, role in _STACK_ENDINGS.items() if role != "input_scale"]
    names = [name_beside(stem, ending) for ending in (*_ENDINGS, *of_stacks)]
    return [name for name in dict.fromkeys(names) if name in tensors]


def _faults(encoding: Encoding, stem: str, tensors: Mapping[str, TensorInfo]) -> list[Fault]:
    faults: list[Fault] = []
    own = stem + encoding.ending
    codes = tensors.get(own)
    needed = {own, *(name_beside(stem, scale.ending) for scale in encoding.scales)}
    sizes = None
    if codes is None:
        faults.append(_missing(own, encoding.name, "qweight", needed, tensors))
    elif codes.dtype not in encoding.dtypes:
        faults.append(_wrong_dtype(codes, encoding.dtypes, encoding.name, "qweight"))
    else:
        sizes = encoding.sizes(codes)
        if sizes is None:
            faults.append(
                Fault(own, f"has shape {list(codes.shape)}, which no weight has", "qweight")
            )
    for scale in encoding.scales:
        name = name_beside(stem, scale.ending)
        info = tensors.get(name)
        if info is None:
            faults.append(_missing(name, encoding.name, scale.role, needed, tensors))
            continue
        if info.dtype not in scale.dtypes:
            faults.append(_wrong_dtype(info, scale.dtypes, encoding.name, scale.role))
        if sizes is None:
            continue
        lead, n, k = sizes
        expected = (*lead, *scale.part(info.dtype).shape(n, k))
        if scale.is_whole and k % scale.columns:
            faults.append(Fault(own, f"has {k} columns, no multiple of {scale.columns}", "qweight"))
        elif info.shape not in encoding.shapes_of(scale, lead, n, k):
            faults.append(
                Fault(
                    info.name,
                    f"has shape {list(info.shape)}; expected {list(expected)} beside codes "
                    f"{list(codes.shape) if codes else ''}",
                    scale.role,
                )
            )
    if encoding.ending == "_packed":
        needed.update(f"{stem}{ending}" for ending in SHAPE_ENDINGS)
    faults += _extra(needed, encoding.name, stem, tensors)
    return faults


def _faults_of_stack(form: StackForm, stem: str, tensors: Mapping[str, TensorInfo]) -> list[Fault]:
    faults: list[Fault] = []
    codes = tensors.get(stem)
    needed = {stem, *(stem + ending for _, ending, _, _ in form.scales)}
    if codes is None:
        faults.append(_missing(stem, form.what, "qweight", needed, tensors))
    elif codes.dtype != form.dtype:
        faults.append(_wrong_dtype(codes, (form.dtype,), form.what, "qweight"))
    for role, ending, dtype, columns in form.scales:
        info = tensors.get(stem + ending)
        if info is None:
            faults.append(_missing(stem + ending, form.what, role, needed, tensors))
            continue
        if info.dtype != dtype:
            faults.append(_wrong_dtype(info, (dtype,), form.what, role))
        if codes is not None and len(codes.shape) == 3:
            expected = form.scale_shape(codes, columns)
            if info.shape != expected:
                faults.append(
                    Fault(
                        info.name,
                        f"has shape {list(info.shape)}; expected {list(expected)} beside codes "
                        f"{list(codes.shape)}",
                        role,
                    )
                )
    faults += _extra(needed, form.what, stem, tensors)
    return faults


def _extra(
    needed: Container[str], what: str, stem: str, tensors: Mapping[str, TensorInfo]
) -> list[Fault]:
    extra = [name for name in _beside(stem, tensors) if name not in needed]
    return [Fault(name, f"is left over: {what} has no such tensor", "leftover") for name in extra]


def _missing(
    name: str, what: str, role: str, needed: Iterable[str], tensors: Mapping[str, TensorInfo]
) -> Fault:
    there = sorted(other.rpartition(".")[2] for other in needed if other in tensors)
    return Fault(name, f"is missing; {what} needs it beside {', '.join(there)}", role, True)


def _wrong_dtype(info: TensorInfo, expected: Sequence[str], what: str, role: str) -> Fault:
    wanted = " or ".join(expected)
    return Fault(info.name, f"is {info.dtype}; expected {wanted} of {what}", role)
