"""Turn experts and linear layers into jobs: which bytes are read, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from .calibration import Calibration
from .choice import output_name
from .dtypes import itemsize, nbytes_of
from .errors import FormatError, LayoutError, Problems, show, show_some
from .formats import QuantFormat
from .headers import TensorInfo
from .layouts import SPLIT, Detection, Experts, Range
from .modules import module_of
from .packing import CopyUnit, QuantUnit
from .plan import Job, OutTensor, Read, Slab

__all__ = ["UnitMaker"]


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
        *readers, down = found.projections
        jobs = []
        for names, rows, columns, ranges_of, is_transposed, is_interleaved in (
            (
                *(tuple(readers), found.gate_up_rows, found.hidden, found.gate_up_ranges),
                *(found.stores_transposed[0], found.is_interleaved),
            ),
            (
                *((down,), (found.hidden,), found.intermediate, found.down_ranges),
                *(found.stores_transposed[1], False),
            ),
        ):
            slabs = tuple(
                Slab(
                    tuple(map(self._read, ranges_of(expert))),
                    tuple(f"{found.output}.{found.first + expert}.{name}" for name in names),
                    tuple(_label(range_, found, expert) for range_ in ranges_of(expert)),
                )
                for expert in range(found.num_experts)
            )
            jobs.append(
                Job(
                    slabs,
                    rows,
                    columns,
                    self._tensors[found.gate_up[0]].dtype,
                    self._input_amax(found, names, columns),
                    is_transposed,
                    is_interleaved,
                )
            )
        return [QuantUnit(tuple(jobs)), *self._split_biases(found)]

    def of_fused_experts(self, found: Experts) -> list[CopyUnit | QuantUnit]:
        """Experts of a layer, in the fused form of the source: a unit for each tensor."""
        *readers, down = found.projections
        I, H = found.intermediate, found.hidden
        units: list[CopyUnit | QuantUnit] = []
        for tensor, names, rows, columns, ranges_of in (
            (found.gate_up[0], tuple(readers), 2 * I, H, found.gate_up_ranges),
            (found.down[0], (down,), H, I, found.down_ranges),
        ):
            slabs = tuple(
                Slab(
                    tuple(map(self._read, ranges_of(expert))),
                    (tensor,),
                    tuple(_label(range_, found, expert) for range_ in ranges_of(expert)),
                )
                for expert in range(found.num_experts)
            )
            amax = self._input_amax(found, names, columns)
            job = Job(slabs, (rows,), columns, self._tensors[tensor].dtype, amax, True)
            units.append(QuantUnit((replace(job, is_stacked=True),)))
        units += (
            self.of_copy(self._tensors[name], name, "bias of routed experts")
            for name in found.biases
        )
        return units

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

    def _split_biases(self, found: Experts) -> Iterator[CopyUnit]:
        """The biases of each expert, split as their weights are."""
        *readers, down = found.projections
        for bias, names, rows in zip(
            found.biases,
            (readers, [down]),
            (found.gate_up_rows, (found.hidden,)),
            strict=bool(found.biases),
        ):
            info = self._tensors[bias]
            pair = 2 * itemsize(info.dtype) if found.is_interleaved and len(names) == 2 else 0
            for expert in range(found.num_experts):
                module = f"{found.output}.{found.first + expert}"
                yield CopyUnit(
                    bias,
                    self._read(Range(bias, expert * sum(rows), sum(rows))),
                    tuple(
                        OutTensor(f"{module}.{name}.bias", info.dtype, (count,))
                        for name, count in zip(names, rows, strict=True)
                    ),
                    "bias of routed experts",
                    pair,
                )

    def _input_amax(self, found: Experts, names: tuple[str, ...], columns: int) -> float | None:
        if columns % self._format.k_multiple:
            self._indivisible(f"{found.source} {'/'.join(names)}", columns)
        if self._calibration is None:
            return None
        return self._calibration.experts_amax(found, names, self._problems)

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


def _label(range_: Range, found: Experts, expert: int) -> str:
    return range_.tensor if found.layout == SPLIT else f"{range_.tensor}[expert {expert}]"
