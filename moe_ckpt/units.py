"""Turn experts and linear layers into jobs: which bytes are read, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .calibration import Calibration
from .choice import output_name
from .dtypes import itemsize, nbytes_of
from .errors import FormatError, LayoutError, Problems, show, show_some
from .formats import QuantFormat
from .headers import TensorInfo
from .layouts import SPLIT, Detection, Experts, Range, Side
from .modules import module_of
from .packing import CopyUnit, QuantUnit
from .plan import Job, OutTensor, Read, Slab

__all__ = ["UnitMaker"]

_BIAS = "bias of routed experts"


class UnitMaker:
    """Makes units in one number format; problems are collected, not raised."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        detection: Detection,
        number_format: QuantFormat,
        calibration: Calibration | None,
        problems: Problems,
    ) -> None:
        self._tensors = tensors
        self._detection = detection
        self._format = number_format
        self._calibration = calibration
        self._problems = problems

    def of_experts(self, found: Experts) -> list[CopyUnit | QuantUnit]:
        """Experts of a layer, a matrix each: one unit, and units for their biases."""
        jobs = tuple(self._experts_job(found, side, is_stacked=False) for side in found.sides)
        biases = [bias for side in found.sides for bias in self._split_bias(found, side)]
        return [QuantUnit(jobs), *biases]

    def of_fused_experts(self, found: Experts) -> list[CopyUnit | QuantUnit]:
        """Experts of a layer, in the fused form of the source: a unit for each tensor."""
        jobs = [self._experts_job(found, side, is_stacked=True) for side in found.sides]
        biases = [self.of_copy(self._tensors[name], name, _BIAS) for name in found.biases]
        return [*(QuantUnit((job,)) for job in jobs), *biases]

    def of_copy(self, info: TensorInfo, name: str, reason: str) -> CopyUnit:
        """A tensor that stays as it is, under a name."""
        read = Read(info.shard, info.offset, info.nbytes)
        return CopyUnit(info.name, read, (OutTensor(name, info.dtype, info.shape),), reason)

    def of_linears(self, group: tuple[str, ...]) -> list[QuantUnit]:
        """One unit for linear layers that share an amax, or one for each if they do not."""
        infos = [self._tensors[f"{module}.weight"] for module in group]
        amax = None
        if self._calibration:
            names = [(module, output_name(self._detection, module)) for module in group]
            amax = self._calibration.linears_amax(names, self._problems)
        for info in infos:
            if info.shape[1] % self._format.k_multiple:
                self._indivisible(info.name, info.shape[1])
        alike = len({info.dtype for info in infos}) == 1
        if len(infos) > 1 and self._format.shares_dense_amax and not alike:
            self._problems.add(
                LayoutError,
                f"{show_some(info.name for info in infos)}: read the same input and must share a "
                "scale, but differ in dtype",
            )
        together = self._format.shares_dense_amax and alike
        return [
            QuantUnit((self._linear_job(members, amax),))
            for members in ([infos] if together else [[info] for info in infos])
        ]

    def _linear_job(self, infos: list[TensorInfo], amax: float | None) -> Job:
        slab = Slab(
            tuple(Read(info.shard, info.offset, info.nbytes) for info in infos),
            tuple(output_name(self._detection, module_of(info.name)) for info in infos),
            tuple(info.name for info in infos),
        )
        first = infos[0]
        return Job((slab,), tuple(i.shape[0] for i in infos), first.shape[1], first.dtype, amax)

    def _experts_job(self, found: Experts, side: Side, *, is_stacked: bool) -> Job:
        """The job of one side of a layer's experts, each a slab."""
        slabs = []
        for expert in range(found.num_experts):
            ranges = found.ranges(side, expert)
            module = _module(found, expert)
            modules = side.tensors if is_stacked else [f"{module}.{n}" for n in side.projections]
            labels = tuple(_label(range_, found, expert) for range_ in ranges)
            slabs.append(Slab(tuple(map(self._read, ranges)), tuple(modules), labels))
        return Job(
            slabs=tuple(slabs),
            rows=(sum(side.rows),) if is_stacked else side.rows,
            columns=side.columns,
            dtype=self._tensors[side.tensors[0]].dtype,
            input_amax=self._input_amax(found, side),
            is_transposed=side.is_transposed,
            is_interleaved=side.is_interleaved and not is_stacked,
            is_stacked=is_stacked,
        )

    def _split_bias(self, found: Experts, side: Side) -> Iterator[CopyUnit]:
        """The bias of each expert, split as its weights are."""
        if not side.bias:
            return
        dtype, rows = self._tensors[side.bias].dtype, sum(side.rows)
        for expert in range(found.num_experts):
            module = _module(found, expert)
            yield CopyUnit(
                source=side.bias,
                read=self._read(Range(side.bias, expert * rows, rows)),
                tensors=tuple(
                    OutTensor(f"{module}.{name}.bias", dtype, (count,))
                    for name, count in zip(side.projections, side.rows, strict=True)
                ),
                reason=_BIAS,
                pair_nbytes=2 * itemsize(dtype) if side.is_interleaved else 0,
            )

    def _input_amax(self, found: Experts, side: Side) -> float | None:
        if side.columns % self._format.k_multiple:
            self._indivisible(f"{found.source} {'/'.join(side.projections)}", side.columns)
        if self._calibration is None:
            return None
        return self._calibration.experts_amax(found, side.projections, self._problems)

    def _read(self, range_: Range) -> Read:
        info = self._tensors[range_.tensor]
        start, nbytes = (nbytes_of(info.dtype, (n,)) for n in (range_.start, range_.count))
        return Read(info.shard, info.offset + start, nbytes)

    def _indivisible(self, what: str, columns: int) -> None:
        self._problems.add(
            FormatError,
            f"{show(what)}: has {columns} columns, {self._format.name} needs a multiple of "
            f"{self._format.k_multiple}; use --format fp8-tensor",
        )


def _module(found: Experts, expert: int) -> str:
    return f"{found.output}.{found.first + expert}"


def _label(range_: Range, found: Experts, expert: int) -> str:
    return range_.tensor if found.layout == SPLIT else f"{range_.tensor}[expert {expert}]"
