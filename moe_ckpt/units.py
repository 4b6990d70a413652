"""Turn experts and linear layers into jobs: which bytes are read, and what they become."""

from __future__ import annotations

from collections.abc import Mapping

from .calibration import Calibration
from .choice import output_name
from .dtypes import nbytes_of
from .errors import FormatError, LayoutError, Problems, show, show_some
from .formats import QuantFormat
from .headers import TensorInfo
from .layouts import Detection, Experts, Rows
from .modules import module_of
from .packing import QuantUnit
from .plan import Job, Read, Slab

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

    def of_experts(self, found: Experts) -> QuantUnit:
        """One unit for the experts of a layer: gate and up, and down."""
        gate, up, down = found.projections
        I, H = found.intermediate, found.hidden
        jobs = []
        for names, rows, columns, rows_of in (
            ((gate, up), (I, I), H, found.gate_up_rows),
            ((down,), (H,), I, found.down_rows),
        ):
            if columns % self._format.k_multiple:
                self._indivisible(f"{found.source} {'/'.join(names)}", columns)
            amax = None
            if self._calibration:
                amax = self._calibration.experts_amax(found, names, self._problems)
            slabs = tuple(
                Slab(
                    tuple(self._read(range_, columns) for range_ in rows_of(expert)),
                    tuple(f"{found.output}.{expert}.{name}" for name in names),
                    tuple(_label(range_, found, expert) for range_ in rows_of(expert)),
                )
                for expert in range(found.num_experts)
            )
            dtype = self._tensors[found.gate_up[0]].dtype
            jobs.append(Job(slabs, rows, columns, dtype, amax))
        return QuantUnit(tuple(jobs))

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

    def _read(self, rows: Rows, columns: int) -> Read:
        info = self._tensors[rows.tensor]
        row_nbytes = nbytes_of(info.dtype, (columns,))
        return Read(info.shard, info.offset + rows.start * row_nbytes, rows.count * row_nbytes)

    def _indivisible(self, what: str, columns: int) -> None:
        self._problems.add(
            FormatError,
            f"{show(what)}: has {columns} columns, {self._format.name} needs a multiple of "
            f"{self._format.k_multiple}; use --format fp8-tensor",
        )


def _label(rows: Rows, found: Experts, expert: int) -> str:
    return f"{rows.tensor}[expert {expert}]" if found.form == "fused" else rows.tensor
