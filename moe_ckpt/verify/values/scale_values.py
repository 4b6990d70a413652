"""Part 2: scales are numbers, above 0, and equal where runtimes use one for several matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from ...dialects.matching import built_modules
from ...errors import show, show_some
from ...formats import find_format
from ...planning.kv_cache import KV_SCALES
from ...runtimes import RUNTIMES, SGLANG, VLLM
from ...work.reader import SourceReader
from ..findings import ERROR, WARNING, Findings
from ..inventory import Inventory, Module, pairs_of
from ..subject import Subject
from .codes import lost_blocks
from .plausible import check_levels
from .windows import Bad, Looked, bad_codes, integers, look_at

__all__ = ["GATE_UP", "check_scales"]

_WRONG = {
    "block_scale": "the weights of the block become NaN, infinite or 0, and nothing is said",
    "channel_scale": "the weights of the row become NaN, infinite or 0, and nothing is said",
    "global_scale": "the weights of the matrix become NaN, infinite or 0, and nothing is said",
    "input_scale": "one such number makes the output of all experts of the layer NaN or 0, for "
    "runtimes use the largest of all",
    "kv_scale": "attention of the layer puts out NaN or 0",
}
_NO_NUMBER = "the matrix puts out NaN, and after it the model"
GATE_UP = (
    "vLLM uses gate's for both and warns once, so up is wrong by their ratio; so does SGLang, "
    "which refuses compressed-tensors W4A16; TensorRT-LLM stops or takes the larger"
)
_DENSE = (
    "runtimes build them as one layer with one scale, vLLM the largest, and what has another is "
    "wrong by their ratio"
)
_FP8 = "vLLM and SGLang quantize both again with the larger scale, which loses accuracy"
_INPUT = (
    "runtimes use one for all experts of the layer, the largest; TensorRT-LLM stops where gate "
    "and up differ, and so does vLLM for compressed-tensors FP8"
)
_DENSE_INPUT = "runtimes build them as one layer and use the largest, which loses accuracy"
# With these a checkpoint works, and is less accurate than it could be.
_LOSSY = frozenset({_FP8, _INPUT, _DENSE_INPUT})

_HARMED = (VLLM, SGLANG)  # those that use one scale for all, silently
_NEAR = 1.25  # a matrix whose weights are wrong by less is less accurate, but no garbage
_OF_BLOCKS = ("block_scale", "channel_scale")
_ZEROS = "they decode to 0, as they should; a tool that inverts scales makes them NaN"
_BLANK = "most matrices hold nothing at all, as in a file that was never written to"

Values = Mapping[str, float]


def check_scales(
    subject: Subject, inventory: Inventory, findings: Findings, *, read_weights: bool
) -> None:
    """Read all scales, and codes of FP8 weights too if ``read_weights``."""
    shards = subject.source.shards.values()
    tensors = subject.source.tensors
    roles = {
        info.name: part.role
        for module in inventory.quantized
        for part, info in module.parts
        if part.role != "qweight"
    }
    roles |= {name: "kv_scale" for name in tensors if name.endswith(KV_SCALES)}
    findings.counts["scales"] += len(roles)
    looked = look_at(shards, [tensors[name] for name in roles])
    for found in looked.bad:
        _add_bad(found, "scale", _WRONG[roles[found.tensor.name]], findings)
    _check_zeros(subject, inventory, looked, roles, findings)
    if read_weights:
        codes = [
            info
            for module in inventory.quantized
            for part, info in module.parts
            if part.role == "qweight" and part.dtype == "F8_E4M3"
        ]
        findings.counts["FP8 weights"] += len(codes)
        for found in bad_codes(shards, codes):
            _add_bad(found, "weight", _NO_NUMBER, findings)
    _check_experts(inventory, looked.values, findings)
    _check_linears(inventory, looked.values, findings)
    if not subject.unread:
        check_levels(subject, inventory, looked, findings)
    _check_shapes(subject, inventory, findings)


def _add_bad(bad: Bad, what: str, effect: str, findings: Findings) -> None:
    at = f" at {list(bad.position)}" if bad.position else ""
    more = f", and {bad.number - 1} more" if bad.number > 1 else ""
    above = " above 0" if what == "scale" else ""
    problem = f"{what} is {bad.first}{at}{more}; expected a finite number{above}"
    findings.add("scales", show(bad.tensor.name), problem, effect, harms=RUNTIMES)


def _check_zeros(
    subject: Subject,
    inventory: Inventory,
    looked: Looked,
    roles: Mapping[str, str],
    findings: Findings,
) -> None:
    """Scales of 0 lose weights, unless all codes that they scale are 0, too."""
    modules = {info.name: module for module in inventory.quantized for _, info in module.parts}
    kept: list[Bad] = []
    reader = SourceReader(subject.source.shards.values())
    try:
        for found in looked.zeros:
            name, role = found.tensor.name, roles[found.tensor.name]
            lost: Bad | None = found
            if role in _OF_BLOCKS:
                lost = lost_blocks(reader, modules[name], found)
            if lost:
                _add_bad(lost, "scale", _WRONG[role], findings)
            else:
                kept.append(found)
        reader.check_unchanged()
    finally:
        reader.close()
    blank = {found.tensor.name for found in kept if found.number == prod(found.tensor.shape)}
    is_blank = 2 * len(blank) > len(list(inventory.quantized))
    for found in kept:
        where = show(found.tensor.name)
        number = f"{found.number:,} scale{'s are' if found.number > 1 else ' is'} 0"
        problem = f"{number}, the first at {list(found.position)}, over codes of 0"
        if is_blank and found.tensor.name in blank:
            findings.add("scales", where, problem, _BLANK, harms=RUNTIMES)
        else:
            findings.add("scales", where, problem, _ZEROS, WARNING)


def _check_experts(inventory: Inventory, values: Values, findings: Findings) -> None:
    """Gate and up of an expert have one global scale; a layer one activation scale each side."""
    for name, experts in inventory.experts.items():
        projections = experts.projections
        pairs = pairs_of(projections)
        for matrices in experts.split.values():
            for pair in pairs:
                modules = [matrices[projection] for projection in pair if projection in matrices]
                _refuse_unequal("global_scale", modules, values, findings, GATE_UP)
        joined = {projection for pair in pairs for projection in pair}
        for side in (*pairs, *((p,) for p in projections if p not in joined)):
            modules = [
                module
                for matrices in experts.split.values()
                for projection, module in matrices.items()
                if projection in side
            ]
            what = f"{'/'.join(side)} in {show(name)}"
            _refuse_unequal_inputs(what, modules, values, findings)


def _check_linears(inventory: Inventory, values: Values, findings: Findings) -> None:
    """What runtimes build as one layer has one scale."""
    linears = inventory.linears
    quantized = [name for name, module in linears.items() if module.is_quantized]
    for members in built_modules(quantized).values():
        if len(members) > 1:
            modules = [linears[member] for member in members]
            # Of FP8 every projection may have its own: runtimes quantize them again.
            if all(find_format(module.format).shares_dense_amax for module in modules):
                _refuse_unequal("global_scale", modules, values, findings, _DENSE)
            _refuse_unequal("input_scale", modules, values, findings, _DENSE_INPUT)


def _values_of(role: str, modules: Sequence[Module], values: Values) -> list[tuple[str, float]]:
    """The scales of modules that have one, by the names of their tensors."""
    infos = [info for module in modules if (info := module.tensor(role)) is not None]
    return [(info.name, values[info.name]) for info in infos if info.name in values]


def _refuse_unequal(
    role: str, modules: Sequence[Module], values: Values, findings: Findings, effect: str
) -> None:
    """Report matrices whose scale is not that of the first."""
    found = _values_of(role, modules, values)
    for name, value in found[1:]:
        if value != found[0][1]:
            problem = f"is {value:.9g}, and {show(found[0][0])} is {found[0][1]:.9g}"
            is_fp8 = role == "global_scale" and modules[0].format == "fp8-tensor"
            then = _FP8 if is_fp8 else effect
            grade = WARNING if then in _LOSSY else ERROR
            harms = _HARMED if grade == ERROR and _are_far(value, found[0][1]) else ()
            findings.add("scales", show(name), problem, then, grade, harms=harms)


def _are_far(one: float, other: float) -> bool:
    """Whether using one for the other is more than lost accuracy."""
    least, most = sorted((one, other))
    return not 0 < most <= _NEAR * least


def _refuse_unequal_inputs(
    what: str, modules: Sequence[Module], values: Values, findings: Findings
) -> None:
    """Report activation scales that are not that of most experts of the layer."""
    found = _values_of("input_scale", modules, values)
    numbers, counts = np.unique([value for _, value in found], return_counts=True)
    if len(numbers) < 2:
        return
    usual = float(numbers[counts.argmax()])
    others = [name for name, value in found if value != usual]
    findings.add(
        "scales",
        show(others[0]),
        f"is {dict(found)[others[0]]:.9g}; of {what} {len(others)} of {len(found)} are not "
        f"{usual:.9g}: {show_some(others)}",
        _INPUT,
        WARNING,
    )


def _check_shapes(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report N and K of packed integers that are not those of their codes."""
    tensors = subject.source.tensors
    packed = {f"{module.name}.weight_shape": module for module in inventory.quantized}
    infos = [
        tensors[name] for name in packed if name in tensors and tensors[name].dtype[1:] in _INTEGERS
    ]
    for name, items in integers(subject.source.shards.values(), infos).items():
        expected = list(packed[name].shape)
        if items != expected:
            findings.add(
                "scales",
                show(name),
                f"is {items}; the codes are those of {expected}",
                "transformers unpacks the weight to that shape",
            )


_INTEGERS = ("32", "64")
