"""Part 2: what scales decode to is what weights and activations of models are like.

A scale stored as its reciprocal, or as amax / 6 instead of amax / 2688, is a finite number above
0. What it decodes to gives it away: the usual block of a matrix, which no outlier moves, is within
a factor of a few in all matrices of a model, and between 0.005 and 2 in those of sound ones. The
bounds are far from both, see docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import prod
from typing import NamedTuple

from ...errors import show
from ...formats import QuantFormat, find_format
from ...runtimes import RUNTIMES
from ...words import count_of
from ...work.reader import SourceReader
from ..findings import ERROR, WARNING, Findings
from ..inventory import Inventory, Module
from ..subject import Subject
from .codes import nonzero_codes
from .levels import Level
from .windows import Looked

__all__ = ["check_levels"]

# What the largest code of the usual block decodes to, in half of all matrices and in any one.
_LEAST, _MOST = 1e-4, 16.0
_TIMES_SISTERS = 100.0
_LIKE_SISTERS = 4.0  # what is that near to the others is like them, even where it is above a bound
# Of a scale for the whole matrix, which one outlier decides, and which is larger without any.
_MOST_WHOLE, _MOST_OF_ONE_WHOLE = 64.0, 1024.0
_TIMES_SISTERS_WHOLE = 300.0
# The largest magnitude of activations, of half the matrices of a name and of any one.
_LEAST_INPUT, _MOST_INPUT, _MOST_OF_ONE_INPUT = 1e-3, 1e3, 1e6
_TIMES_INPUTS, _RARE_INPUTS = 1e4, 300.0
# What reads hidden states after a norm, which bounds them; others read products of activations.
_AFTER_NORM = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "q_proj", "k_proj", "v_proj")
_MISTAKES = (448.0, 2688.0)
_LEAST_BLOCK_SCALE = 16.0
_SKEW = 64.0  # a matrix whose largest block is so far above the usual may have lost all others
_SCALES = ("block_scale", "channel_scale", "global_scale")
_FEW, _SHARE = 16, 1000

_TOO_LARGE = "the matrix computes with weights that no model has, and the model puts out noise"
_TOO_SMALL = "what the matrix puts out is lost in the rest, and the model puts out noise"
_UNLIKE = "if the scale is wrong, the matrix adds next to nothing; an expert that training left "
_UNLIKE += "out is like that, too"
_INPUTS = "activations are rounded to 0, or cut off: the matrix puts out noise"
_RARE = "if no activation is so large, those of all experts of the layer are rounded to 0, for "
_RARE += "runtimes use the largest of all; a few experts of sound models are like that"
_NOTHING = "the matrix puts out nothing, as in a model that does not use it"
_OUTLIER = (
    "what the matrix computed is lost; look at its largest weight in the source, and choose a "
    "format with a scale for fewer weights if it is right"
)
_COARSE = "weights of small blocks are rounded to 0: scales of blocks have no steps below 1/512"


class _Measured(NamedTuple):
    """A matrix, and what its largest code decodes to in its usual and in its largest block."""

    module: Module
    format: QuantFormat
    usual: float
    largest: float
    scale: float
    blocks: Level | None

    @property
    def where(self) -> str:
        """The tensor whose number decides the level."""
        scales = [info for part, info in self.module.parts if part.role in _SCALES]
        return (self.module.tensor("global_scale") or scales[0]).name


def check_levels(
    subject: Subject, inventory: Inventory, looked: Looked, findings: Findings
) -> None:
    """Hold what scales decode to against each other and against what models are like.

    A conversion of ours has the scales of its source's weights; if these are like those of no
    model, that is a warning.
    """
    grade = WARNING if subject.is_ours else ERROR
    wrong = {bad.tensor.name for bad in looked.bad}
    wrong |= {bad.tensor.name for bad in looked.zeros if bad.tensor.name in looked.values}
    measured, inputs = [], []
    for module in inventory.quantized:
        found = _measure(module, looked, wrong)
        if found:
            measured.append(found)
        scale = _input_of(module, looked.values, wrong)
        if scale:
            inputs.append(scale)
    reader = SourceReader(subject.source.shards.values())
    try:
        pools: dict[str, list[_Measured]] = {}
        for found in measured:
            if not _is_empty(reader, found, findings):
                pools.setdefault(found.format.weights, []).append(found)
        for pool in pools.values():
            _check_weights(reader, pool, findings, grade)
            _check_blocks(pool, findings)
        reader.check_unchanged()
    finally:
        reader.close()
    _check_inputs(inputs, findings, grade)


def _measure(module: Module, looked: Looked, wrong: Set[str]) -> _Measured | None:
    target = find_format(module.format)
    if target.codes is None:
        return None
    scale, blocks = 1.0, None
    for part, info in module.parts:
        if part.role in ("qweight", "input_scale"):
            continue
        if info.name in wrong:
            return None
        level = looked.levels.get(info.name)
        value = looked.values.get(info.name)
        if value is not None:
            level = Level(value, value, 0, 0)
        if part.is_scalar:
            number = value if value is not None else level.largest if level else 0.0
            scale = 1 / number if part.role in module.inverse and number else number
        elif level is None:
            return None
        elif value is not None:
            scale *= value
        else:
            blocks = level
    one = scale * target.codes.largest
    if not one or (blocks and not blocks.largest):
        return None
    usual, largest = (blocks.usual, blocks.largest) if blocks else (1.0, 1.0)
    return _Measured(module, target, one * usual, one * largest, scale, blocks)


def _is_empty(reader: SourceReader, found: _Measured, findings: Findings) -> bool:
    """Whether nothing is left in a matrix but its largest weights, if that; it is reported."""
    blocks = found.blocks
    if blocks is None:
        is_suspect = found.scale == 1
    else:
        is_suspect = (
            blocks.smallest in (blocks.largest, 0.0) or blocks.largest > _SKEW * blocks.usual
        )
    return is_suspect and _report_empty(reader, found, findings)


def _report_empty(reader: SourceReader, found: _Measured, findings: Findings) -> bool:
    count = prod(found.module.shape)
    most = max(_FEW, count // _SHARE)
    left = nonzero_codes(reader, found.module, most)
    if left > most or count <= most:
        return False
    name = show(found.module.parts[0][1].name)
    if left:
        problem = (
            f"all but {left:,} of {count:,} weights are 0; the largest is {found.largest:.3g}, "
            "beside which the others were rounded to 0"
        )
        findings.add("scales", name, problem, _OUTLIER, WARNING)
    else:
        findings.add("scales", name, f"all of {count:,} weights are 0", _NOTHING, WARNING)
    return True


def _check_weights(
    reader: SourceReader, pool: Sequence[_Measured], findings: Findings, grade: str
) -> None:
    """Report matrices of a format that decode to what no others do, or no model has."""
    usual = _lower_median([found.usual for found in pool])
    is_whole = pool[0].blocks is None
    most = _MOST_WHOLE if is_whole else _MOST
    if not _LEAST <= usual <= most:
        is_large = usual > most
        outside = [one for one in pool if (one.usual > most if is_large else one.usual < _LEAST)]
        first = outside[0]
        bound = f"at most {most:g}" if is_large else f"at least {_LEAST:g}"
        problem = (
            f"is {_stored(first)}, so that {_of(first)} decode to {first.usual:.3g}, and so "
            f"it is of {len(outside):,} of {count_of(len(pool), 'matrix')} in {first.format.name}; "
            f"those of models are {bound}{_fits(first, 0.1)}"
        )
        effect = _TOO_LARGE if is_large else _TOO_SMALL
        findings.add("scales", show(first.where), problem, effect, grade, harms=RUNTIMES)
        return
    times = _TIMES_SISTERS_WHOLE if is_whole else _TIMES_SISTERS
    most_of_one = _MOST_OF_ONE_WHOLE if is_whole else _MOST
    told = {found.where for found in findings.of_grade(ERROR) if found.part == "scales"}
    for one in pool:
        if show(one.where) in told:  # it is not that of the matrix that shares it
            continue
        if one.usual > min(max(most_of_one, _LIKE_SISTERS * usual), times * usual):
            if not _report_empty(reader, one, findings):
                problem = _unlike(one, usual)
                findings.add("scales", show(one.where), problem, _TOO_LARGE, grade, harms=RUNTIMES)
        elif one.usual < usual / times:
            findings.add("scales", show(one.where), _unlike(one, usual), _UNLIKE, WARNING)


def _unlike(one: _Measured, usual: float) -> str:
    """How a matrix differs from the others of its format."""
    return (
        f"is {_stored(one)}, so that {_of(one)} decode to {one.usual:.3g}; that is {usual:.3g} in "
        f"half of all in {one.format.name}{_fits(one, usual)}"
    )


def _of(found: _Measured) -> str:
    """What it is that decodes to a level."""
    return "its largest weights" if found.blocks is None else "the largest weights of its blocks"


def _stored(found: _Measured) -> str:
    """The number that is stored, as far as it is one."""
    if found.module.tensor("global_scale") is None:
        return f"{found.blocks.usual:.6g} on average" if found.blocks else f"{found.scale:.6g}"
    is_inverse = "global_scale" in found.module.inverse
    return f"{1 / found.scale if is_inverse else found.scale:.6g}"


def _fits(found: _Measured, usual: float) -> str:
    """Which scale would decode to what is usual, if it is one that is mistaken for another."""
    has_global = found.module.tensor("global_scale") is not None
    own = found.scale if has_global or found.blocks is None else found.blocks.usual
    if usual / 50 < found.usual / own**2 < usual * 50:
        return "; its reciprocal would fit"
    for times in _MISTAKES:
        if usual / 10 < found.usual / times < usual * 10:
            return f"; a number {times:g} times smaller would fit"
        if usual / 10 < found.usual * times < usual * 10:
            return f"; a number {times:g} times larger would fit"
    return ""


def _check_blocks(pool: Sequence[_Measured], findings: Findings) -> None:
    """Report global scales that leave most of the range of block scales unused."""
    largest = [
        found.blocks.largest
        for found in pool
        if found.blocks and found.module.tensor("global_scale")
    ]
    if not largest:
        return
    usual = _lower_median(sorted(largest))
    if usual < _LEAST_BLOCK_SCALE:
        first = next(one for one in pool if one.blocks and one.blocks.largest <= usual)
        problem = (
            f"is {_stored(first)}, so that scales of blocks are at most {usual:g} in half of "
            f"{count_of(len(pool), 'matrix')} in {first.format.name}; the formula makes the "
            "largest 448"
        )
        findings.add("scales", show(first.where), problem, _COARSE, WARNING)


class _Input(NamedTuple):
    """An activation scale: its tensor, what is stored, and the amax that it stands for."""

    key: tuple[str, str]
    name: str
    stored: float
    amax: float


def _input_of(module: Module, values: Mapping[str, float], wrong: Set[str]) -> _Input | None:
    info = module.tensor("input_scale")
    target = find_format(module.format)
    if info is None or info.name not in values or info.name in wrong or not target.largest:
        return None
    stored = values[info.name]
    if stored == 1:  # what stands for one that is not known
        return None
    scale = 1 / stored if "input_scale" in module.inverse else stored
    key = target.name, module.name.rpartition(".")[2]
    return _Input(key, info.name, stored, scale * target.largest)


def _check_inputs(inputs: Sequence[_Input], findings: Findings, grade: str) -> None:
    """Report activation scales that no activations have, or none of the same name."""
    pools: dict[tuple[str, str], list[_Input]] = {}
    for one in inputs:
        pools.setdefault(one.key, []).append(one)
    for (_, projection), pool in pools.items():
        usual = _lower_median([one.amax for one in pool])
        if not _LEAST_INPUT <= usual <= _MOST_INPUT:
            is_large = usual > _MOST_INPUT
            outside = [one for one in pool if (one.amax >= usual) == is_large or one.amax == usual]
            bound = f"at most {_MOST_INPUT:g}" if is_large else f"at least {_LEAST_INPUT:g}"
            problem = (
                f"is {outside[0].stored:.6g}, which stands for activations of up to "
                f"{outside[0].amax:.3g}, and so it is of {len(outside):,} of {len(pool):,} of "
                f"{show(projection)}; in half of those of a model it is {bound}"
            )
            findings.add("scales", show(outside[0].name), problem, _INPUTS, grade, harms=RUNTIMES)
            continue
        times = _RARE_INPUTS if projection in _AFTER_NORM else _TIMES_INPUTS
        for one in pool:
            is_wrong = one.amax > min(_MOST_OF_ONE_INPUT, times * usual)
            if not (is_wrong or one.amax > _RARE_INPUTS * usual):
                continue
            problem = (
                f"is {one.stored:.6g}, which stands for activations of up to {one.amax:.3g}; that "
                f"is {usual:.3g} in half of all of {show(projection)}"
            )
            if is_wrong:
                findings.add("scales", show(one.name), problem, _INPUTS, grade, harms=RUNTIMES)
            else:
                findings.add("scales", show(one.name), problem, _RARE, WARNING)


def _lower_median(numbers: Sequence[float]) -> float:
    """The median; the lower of the two in the middle, for it is large ones that are mistakes."""
    return sorted(numbers)[(len(numbers) - 1) // 2]
