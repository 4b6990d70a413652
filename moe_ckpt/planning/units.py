"""Turn experts and linear layers into jobs: which bytes are read, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..dialects import Dialect
from ..dialects.matching import built_modules
from ..dtypes import itemsize
from ..errors import CheckpointError, FormatError, LayoutError, Problems, show, show_some
from ..formats import Part, QuantFormat, find_format
from ..formats.fitting import formats_that_fit
from ..layouts import Detection, Experts, Side
from ..layouts.places import expert_modules, place_of_experts, place_of_linears
from ..layouts.roles import have_one_scale, module_of
from ..plan import Job, Output, OutTensor
from ..source.headers import TensorInfo
from ..source.stored import Encoded, Place
from ..source.weights import Weights
from .calibration import Calibration
from .shards import CopyUnit, QuantUnit

__all__ = ["UnitMaker", "share_amax", "split_biases"]

_BIAS = "bias of routed experts"


class UnitMaker:
    """Makes units; problems are collected, not raised.

    ``weight_amax`` is the largest magnitude of output modules, from a scan. ``kept_dtypes``: as in
    `Assigned`. ``part_blocks`` collects linear layers that end in a part of a block.
    """

    def __init__(
        self,
        weights: Weights,
        detection: Detection,
        dialect: Dialect,
        calibration: Calibration | None,
        weight_amax: Mapping[str, float],
        problems: Problems,
        *,
        may_requantize: bool,
        kept_dtypes: Mapping[tuple[str, str], str],
    ) -> None:
        self._weights = weights
        self._detection = detection
        self._dialect = dialect
        self._calibration = calibration
        self._weight_amax = weight_amax
        self._problems = problems
        self._may_requantize = may_requantize
        self._kept_dtypes = kept_dtypes
        self.part_blocks: list[str] = []

    def of_experts(self, found: Experts, target: QuantFormat) -> list[CopyUnit | QuantUnit]:
        """Experts of a layer, a matrix each: one unit, and units for their biases."""
        jobs = tuple(self._experts_job(found, side, target) for side in found.sides)
        biases = [bias for side in found.sides for bias in split_biases(self._weights, found, side)]
        return [QuantUnit(jobs), *biases]

    def of_fused_experts(self, found: Experts, target: QuantFormat) -> list[CopyUnit | QuantUnit]:
        """Experts of a layer, in the fused form of the source: a unit for each tensor."""
        jobs = [self._experts_job(found, side, target, is_stacked=True) for side in found.sides]
        tensors = self._weights.tensors
        biases = [self.of_copy(tensors[name], name, _BIAS) for name in found.biases]
        return [*(QuantUnit((job,)) for job in jobs), *biases]

    def of_copy(self, info: TensorInfo, name: str, reason: str) -> CopyUnit:
        """A tensor that stays as it is, under a name."""
        (read,) = self._weights.reads(info.name)
        return CopyUnit(info.name, read, (OutTensor(name, info.dtype, info.shape),), reason)

    def of_stays(self, names: Sequence[str], target: QuantFormat) -> list[QuantUnit]:
        """Weights that stay, in their form or decoded; their input scales are the source's.

        They are stored alike, and read the same input: they share a scale where runtimes want it.
        """
        infos = [self._weights.tensors[name] for name in names]
        for info in infos:
            if len(info.shape) != 2 or not info.name.endswith(".weight"):
                self._problems.add(
                    CheckpointError,
                    f"{show(info.name)} {list(info.shape)}: is {self._weights.what_is(info.name)}; "
                    "outside the routed experts only quantized matrices of linear layers can be "
                    "read",
                )
                return []
        together = target.shares_dense_amax
        return [
            QuantUnit((self._linear_job(members, None, target),))
            for members in ([infos] if together else [[info] for info in infos])
        ]

    def of_linears(self, group: Sequence[str], target: QuantFormat) -> list[QuantUnit]:
        """One unit for linear layers that share an amax, or one for each if they do not."""
        infos = [self._weights.tensors[f"{module}.weight"] for module in group]
        amax = None
        if self._calibration and target.input_scale:
            names = [(module, self._detection.output_name(module)) for module in group]
            amax = self._calibration.linears_amax(names, self._problems)
        built = built_modules([self._detection.output_name(module) for module in group])
        followed = {member for members in built.values() for member in members[:-1]}
        for module, info in zip(group, infos, strict=True):
            n, k = info.shape
            whole = self._detection.output_name(module) in followed
            if k % target.k_multiple or (whole and n % target.n_multiple):
                shapes = [info.shape, *(other.shape for other in infos)]
                self._indivisible(info.name, target, shapes)
            elif n % target.n_multiple:
                self.part_blocks.append(info.name)
        alike = len({self._weights.encoded(info.name) for info in infos}) == 1
        if len(infos) > 1 and target.shares_dense_amax and not alike:
            self._problems.add(
                LayoutError,
                f"{show_some(info.name for info in infos)}: read the same input and must share a "
                "scale, but differ in dtype",
            )
        together = share_amax(group, target) and alike
        return [
            QuantUnit((self._linear_job(members, amax, target),))
            for members in ([infos] if together else [[info] for info in infos])
        ]

    def _linear_job(self, infos: list[TensorInfo], amax: float | None, target: QuantFormat) -> Job:
        modules = tuple([self._detection.output_name(module_of(info.name)) for info in infos])
        place = place_of_linears(self._weights, [info.name for info in infos])
        output = Output(modules, self._amax_of(modules))
        return self._job(place, (output,), target, infos[0].name, input_amax=amax)

    def _experts_job(
        self, found: Experts, side: Side, target: QuantFormat, *, is_stacked: bool = False
    ) -> Job:
        """The job of one side of a layer's experts, each a slab."""
        self._check_sizes(found, side, target)
        place = place_of_experts(
            self._weights, found, side, self._problems, in_one_piece=is_stacked
        )
        stack = tuple([name.removesuffix("_blocks") for name in side.tensors])
        outputs = []
        for expert in range(found.num_experts):
            names = expert_modules(found, side, expert)
            outputs.append(Output(stack if is_stacked else names, self._amax_of(names)))
        job = self._job(
            place,
            tuple(outputs),
            target,
            f"{found.source} {'/'.join(side.projections)}",
            input_amax=self._input_amax(found, side, target),
        )
        return replace(job, is_stacked=is_stacked)

    def _job(
        self,
        place: Place,
        outputs: tuple[Output, ...],
        target: QuantFormat,
        what: str,
        *,
        input_amax: float | None,
    ) -> Job:
        encoded = place.encoded
        source = find_format(encoded.format)
        recoded = target.holds(source)
        is_4_to_4 = source.weight_bits == target.weight_bits == 4
        if is_4_to_4 and not recoded and not self._may_requantize:
            self._problems.add(
                FormatError,
                f"{show(what)}: is {source.name} already, and {target.name} would round it a "
                "second time; say --allow-requantize, or start from the original release",
            )
        if (
            target.input_scale
            and not target.constant_input_scale
            and self._calibration is None
            and not (recoded and encoded.has_input_scale)
        ):
            self._problems.add(
                FormatError,
                f"{show(what)}: has no input scale in the source, and {target.name} needs one; "
                "give --stats FILE, or use fp8-channel or fp8-block (dynamic activations)",
            )
        return Job(
            place=place,
            outputs=outputs,
            format=target.name,
            parts=self._parts(encoded, target) if recoded else target.parts,
            inverse=tuple(sorted(self._dialect.spellings[target.name].inverse)),
            input_amax=input_amax,
            is_recoded=recoded,
        )

    def _parts(self, encoded: Encoded, target: QuantFormat) -> tuple[Part, ...]:
        """The parts of a recoded matrix: in the dtypes of the source where they lose by others.

        Weights keep their dtype; so do the scales of integers, which are those of the model, and
        what the dialect keeps.
        """
        stored = {part.role: part.dtype for part in encoded.parts}

        def keeps(role: str) -> bool:
            kept = self._kept_dtypes.get((target.name, role))
            return role == target.keeps_dtype_of or (kept is not None and kept == stored[role])

        return tuple(
            replace(part, dtype=stored[part.role]) if keeps(part.role) else part
            for part in target.parts
        )

    def _check_sizes(self, found: Experts, side: Side, target: QuantFormat) -> None:
        if side.columns % target.k_multiple or any(n % target.n_multiple for n in side.rows):
            shapes = [(n, side.columns) for n in side.rows] + [(found.hidden, found.intermediate)]
            self._indivisible(f"{found.source} {'/'.join(side.projections)}", target, shapes)

    def _input_amax(self, found: Experts, side: Side, target: QuantFormat) -> float | None:
        if self._calibration is None or not target.input_scale:
            return None
        return self._calibration.experts_amax(found, side.projections, self._problems)

    def _amax_of(self, modules: Sequence[str]) -> float | None:
        if not self._weight_amax:
            return None
        known = [self._weight_amax.get(module) for module in modules]
        return None if None in known else max(a for a in known if a is not None)

    def _indivisible(
        self, what: str, target: QuantFormat, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        n, k = shapes[0]
        rows = f"{n} rows and " if target.n_multiple > 1 else ""
        self._problems.add(
            FormatError,
            f"{show(what)}: has {rows}{k} columns, {target.name} needs a multiple of "
            f"{target.k_multiple}; use {formats_that_fit(shapes)}",
        )


def share_amax(modules: Sequence[str], target: QuantFormat) -> bool:
    """Whether linear layers that read the same input share a weight amax in a format."""
    has_one = target.scale is not None and target.scale.is_scalar
    return target.shares_dense_amax or (has_one and have_one_scale(modules))


def split_biases(weights: Weights, found: Experts, side: Side) -> Iterator[CopyUnit]:
    """The bias of each expert, split as its weights are."""
    if not side.bias:
        return
    info, rows = weights.tensors[side.bias], sum(side.rows)
    for expert in range(found.num_experts):
        yield CopyUnit(
            source=side.bias,
            read=weights.reads(side.bias, expert * rows, rows)[0],
            tensors=tuple(
                OutTensor(f"{module}.bias", info.dtype, (count,))
                for module, count in zip(
                    expert_modules(found, side, expert), side.rows, strict=True
                )
            ),
            reason=_BIAS,
            pair_nbytes=2 * itemsize(info.dtype) if side.is_interleaved else 0,
        )
