"""Pair the tensors of a source with those of a checkpoint that was made from it.

Names decide: a weight goes where its module's output name says. What has no counterpart on the
other side is a finding. A pair of matrices knows the job that makes the one of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...dtypes import FLOATS
from ...errors import InputError, Problems, show
from ...formats import find_format
from ...layouts import Detection, Experts, Side
from ...layouts.places import expert_modules, place_of_experts, place_of_linears
from ...layouts.roles import amax_groups, is_matrix, module_of, reason_to_keep, set_aside
from ...plan import Copy, Job
from ...planning.kv_cache import KV_SCALES, scale_places
from ...planning.shards import CopyUnit
from ...planning.units import share_amax, split_biases
from ...source.headers import TensorInfo
from ...source.stored import Encoded, Place
from ...source.weights import Weights
from ..findings import Findings
from ..subject import Subject
from .lookup import Lookup, expert_label
from .remake import Maker, jobs_of, only_job
from .sink import Segment

__all__ = ["CopyPair", "MatrixPair", "Pairs", "pair_up"]

_LOST = "the model runs without it, or on numbers that a runtime made up"
_UNKNOWN = "whether its weights are those of the source is not known"


class CopyPair(NamedTuple):
    """Bytes of the source that should be found again, in these segments."""

    copy: Copy
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class MatrixPair:
    """A slab of the source, and what its matrices should have become, as `Lookup` names it.

    ``job``: what makes the same bytes again; None if only values can be compared.
    """

    place: Place
    slab: int
    names: tuple[str | None, ...]
    job: Job | None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Everything that has a counterpart, in the order of the source."""

    copies: tuple[CopyPair, ...]
    matrices: tuple[MatrixPair, ...]


def pair_up(
    subject: Subject, weights: Weights, detection: Detection, lookup: Lookup, findings: Findings
) -> Pairs:
    """Pair a source, given by its weights and experts, with a checkpoint."""
    pairing = _Pairing(subject, weights, detection, lookup, findings)
    pairing.pair()
    order = {name: position for position, name in enumerate(weights.tensors)}

    def position(pair: MatrixPair) -> tuple[int, int]:
        label = pair.place.slabs[pair.slab].labels[0]
        return order[label.partition("[expert ")[0]], pair.slab

    return Pairs(
        tuple(sorted(pairing.copies, key=lambda pair: order[pair.copy.source])),
        tuple(sorted(pairing.matrices, key=position)),
    )


class _Pairing:
    """One run of `pair_up`."""

    def __init__(
        self,
        subject: Subject,
        weights: Weights,
        detection: Detection,
        lookup: Lookup,
        findings: Findings,
    ) -> None:
        self._subject = subject
        self._weights = weights
        self._detection = detection
        self._lookup = lookup
        self._findings = findings
        self._out = subject.weights
        self._maker = Maker(weights, detection)
        self._explained: set[str] = set()
        self.copies: list[CopyPair] = []
        self.matrices: list[MatrixPair] = []

    def pair(self) -> None:
        """Look at every tensor of the source, then at what is left in the checkpoint."""
        tensors, detection = self._weights.tensors, self._detection
        consumed: set[str] = set()
        for found in detection.experts:
            consumed.update(found.tensors)
            for side in found.sides:
                self._experts(found, side)
        candidates = []
        for name, info in tensors.items():
            if name in consumed:
                continue
            if not self._is_matrix(info):
                self._single(name, info)
            elif self._is_candidate(name) or not self._weights.encoded(name).is_plain:
                candidates.append((module_of(name), info.shape[1]))
            else:
                self._linears((module_of(name),))
        for group in amax_groups(candidates):
            self._linears(group)
        self._findings.counts["source tensors"] += len(tensors)
        for name in self._out.tensors:
            if name not in self._explained and not self._is_kv_scale(name):
                self._add(
                    name,
                    "is not in the source, and nothing there becomes it",
                    "runtimes that know the name load it, others stop",
                )

    def _is_kv_scale(self, name: str) -> bool:
        return self._out.kv_cache and name.endswith(KV_SCALES)

    def _is_matrix(self, info: TensorInfo) -> bool:
        """Whether a tensor is a matrix of numbers and quantized on at least one side."""
        if not is_matrix(info.name, info.shape) or info.dtype not in FLOATS:
            return False
        name = self._find(info.name)
        plain = self._weights.encoded(info.name).is_plain
        return name is not None and not (plain and self._out.encoded(name).is_plain)

    def _is_candidate(self, name: str) -> bool:
        """Whether it is a linear layer that may share an amax with others."""
        aside = set_aside(name, self._detection.stacks, self._detection.num_layers)
        return aside is None and reason_to_keep(module_of(name)) is None

    def _find(self, name: str) -> str | None:
        """The counterpart of a tensor outside the experts."""
        tensors = self._out.tensors
        for candidate in (self._detection.output_name(name), name):
            if candidate in tensors:
                return candidate
        if name.endswith(KV_SCALES):
            return next((place for place in scale_places(name) if place in tensors), None)
        return None

    # What stays as it is

    def _single(self, name: str, info: TensorInfo) -> None:
        """A tensor that should be there again as it was."""
        there = self._find(name)
        if there is None:
            if not self._may_be_gone(name):
                self._add(self._detection.output_name(name), "is missing", _LOST)
            return
        self._explained.add(there)
        found = self._out.tensors[there]
        ours, theirs = (w.encoded(n) for w, n in ((self._weights, name), (self._out, there)))
        if found.shape != info.shape or ours != theirs:
            self._differs(there, self._what(info, ours), self._what(found, theirs))
            return
        infos = [info for _, info in self._out.stored_as(there)] or [found]
        reads = zip(self._weights.reads(name), self._out.reads(there), strict=True)
        for held, (mine, other) in zip(infos, reads, strict=True):
            copy = Copy(name, mine, 0, "")
            self.copies.append(CopyPair(copy, (Segment(0, held, other),)))

    def _may_be_gone(self, name: str) -> bool:
        """A scale of a KV cache that is no longer quantized, or the head, if it is tied."""
        if name.endswith(KV_SCALES):
            return self._weights.kv_cache and not self._out.kv_cache
        levels = [self._subject.config, self._subject.config.get("text_config")]
        tied = any(isinstance(at, dict) and at.get("tie_word_embeddings") is True for at in levels)
        return tied and name.endswith("lm_head.weight")

    def _biases(self, units: Iterable[CopyUnit]) -> None:
        """Biases of experts, which may be one tensor in the source and many here."""
        for unit in units:
            segments, start = [], 0
            for tensor in unit.tensors:
                found = self._out.tensors.get(tensor.name)
                if found is None:
                    self._add(tensor.name, "is missing", _LOST)
                elif (found.dtype, found.shape) != tensor[1:]:
                    self._explained.add(tensor.name)
                    wanted = f"{tensor.dtype} {list(tensor.shape)}"
                    self._differs(tensor.name, wanted, f"{found.dtype} {list(found.shape)}")
                else:
                    self._explained.add(tensor.name)
                    (read,) = self._out.reads(tensor.name)
                    segments.append(Segment(start, found, read))
                start += tensor.nbytes
            copy = Copy(unit.source, unit.read, 0, "", unit.pair_nbytes)
            self.copies.append(CopyPair(copy, tuple(segments)))

    # Experts

    def _experts(self, found: Experts, side: Side) -> None:
        """One side of the experts of a layer, in whatever form they are here."""
        names = [
            [f"{module}.weight" for module in expert_modules(found, side, e)]
            for e in range(found.num_experts)
        ]
        is_split = any(name in self._out.tensors for of_one in names for name in of_one)
        fused = [] if is_split else [n for n in side.tensors if self._is_kept(n)]
        stacks = [name.removesuffix("_blocks") for name in side.tensors]
        if fused:
            for name in side.tensors:
                self._single(name, self._weights.tensors[name])
        elif not is_split and len(stacks) == 1 and self._lookup.is_stacked(stacks[0]):
            self._stacked_experts(found, side, stacks[0])
        else:
            self._split_experts(found, side, names)
        if side.bias and side.bias in self._out.tensors:
            self._single(side.bias, self._weights.tensors[side.bias])
        elif side.bias:
            self._biases(split_biases(self._weights, found, side))

    def _is_kept(self, name: str) -> bool:
        """Whether fused experts are there as they were."""
        there = self._out.tensors.get(name)
        if there is None or there.shape != self._weights.tensors[name].shape:
            return False
        return self._weights.encoded(name) == self._out.encoded(name)

    def _split_experts(self, found: Experts, side: Side, names: Sequence[Sequence[str]]) -> None:
        index = found.sides.index(side)
        present = [[n if n in self._lookup else None for n in of_one] for of_one in names]
        there = [n for of_one in present for n in of_one if n is not None]
        if not there:
            where = f"{found.output}.*.{'/'.join(side.projections)}"
            self._add(where, f"is missing: what {show(side.tensors[0])} should have become", _LOST)
            return
        for name in (n for of_one in names for n in of_one if n not in self._lookup):
            self._add(name, "is missing", _LOST)
        for name in there:
            self._explained.update((name, *self._lookup.fused_with(name)))
        place = self._place(lambda problems: place_of_experts(self._weights, found, side, problems))
        if place is None:
            return
        job = None
        # Ours are split or stacked, and of other fused ones the bytes are not compared.
        if not any(map(self._lookup.fused_with, there)):
            job = self._maker.job(
                {self._lookup.encoded(name) for name in there},
                lambda make, target: jobs_of(make.of_experts(found, target))[index],
            )
        for slab, of_one in enumerate(present):
            self._matrices(place, slab, of_one, job)

    def _stacked_experts(self, found: Experts, side: Side, stack: str) -> None:
        index = found.sides.index(side)
        self._explained.update(self._lookup.tensors_of_stack(stack))
        place = self._place(
            lambda problems: place_of_experts(
                self._weights, found, side, problems, in_one_piece=True
            )
        )
        if place is None:
            return
        job = self._maker.job(
            {self._lookup.encoded_stack(stack)},
            lambda make, target: jobs_of(make.of_fused_experts(found, target))[index],
        )
        shape = (found.num_experts, side.columns, sum(side.rows))
        there = self._lookup.shape_of_stack(stack)
        if shape != there:
            self._differs(stack, f"weights {list(shape)}", f"weights {list(there)}")
            return
        for slab in range(found.num_experts):
            self.matrices.append(MatrixPair(place, slab, (expert_label(stack, slab),), job))

    # Linear layers

    def _linears(self, modules: Sequence[str]) -> None:
        """Linear layers that may share an amax, of which at least one is quantized."""
        names = {module: self._find(f"{module}.weight") for module in modules}
        there = {self._out.encoded(name) for name in names.values() if name is not None}
        ours = {self._weights.encoded(f"{module}.weight") for module in modules}
        alike = len(ours) == len(there) == 1 and None not in names.values()
        target = find_format(next(iter(there)).format)
        source = find_format(next(iter(ours)).format)
        shares = target.shares_dense_amax or (
            share_amax(modules, target) and not target.holds(source)
        )
        if alike and shares and self._made_together(modules, names):
            return
        for module in modules:
            job = None
            if not shares or len(modules) == 1:
                job = self._job_of_linears((module,), names)
            self._slab((module,), names, job)

    def _made_together(self, modules: Sequence[str], names: Mapping[str, str | None]) -> bool:
        """Add linear layers as one slab, if one job makes them so."""
        job = self._job_of_linears(modules, names)
        if job is not None:
            self._slab(modules, names, job)
        return job is not None

    def _job_of_linears(
        self, modules: Sequence[str], names: Mapping[str, str | None]
    ) -> Job | None:
        found = [name for module in modules if (name := names[module]) is not None]
        return self._maker.job(
            {self._out.encoded(name) for name in found},
            lambda make, target: only_job(make.of_linears(modules, target)),
        )

    def _slab(
        self, modules: Sequence[str], names: Mapping[str, str | None], job: Job | None
    ) -> None:
        found = [names[module] for module in modules]
        self._explained.update(name for name in found if name is not None)
        place = place_of_linears(self._weights, [f"{module}.weight" for module in modules])
        self._matrices(place, 0, found, job)

    # Matrices of both

    def _matrices(
        self, place: Place, slab: int, names: Sequence[str | None], job: Job | None
    ) -> None:
        """Add a pair of those matrices whose shapes are right."""
        kept: list[str | None] = []
        for name, rows in zip(names, place.rows, strict=True):
            shape = self._lookup.shape(name) if name else ()
            if name and shape != (rows, place.columns):
                wanted = f"weights {[rows, place.columns]}"
                self._differs(name, wanted, f"weights {list(shape)}")
                kept.append(None)
            else:
                kept.append(name)
        if any(kept):
            whole = None not in kept
            self.matrices.append(MatrixPair(place, slab, tuple(kept), job if whole else None))

    def _place(self, locate: Callable[[Problems], Place]) -> Place | None:
        """A place in the source; that it cannot be read there is a finding."""
        problems = Problems()
        try:
            place = locate(problems)
            problems.check()
        except InputError as error:
            for text in error.problems:
                where, _, problem = text.partition(": ")
                self._add(where, f"cannot be compared with the source: {problem}", _UNKNOWN)
            return None
        return place

    # Findings

    def _what(self, info: TensorInfo, encoded: Encoded) -> str:
        form = info.dtype if encoded.is_plain else encoded.format
        return f"{form} {list(info.shape)}"

    def _differs(self, name: str, wanted: str, found: str) -> None:
        self._add(
            name,
            f"is {found}, and the source says {wanted}",
            "it does not fit the model, or computes in other numbers than the source",
        )

    def _add(self, where: str, problem: str, effect: str) -> None:
        self._findings.add("source", where, problem, effect)
