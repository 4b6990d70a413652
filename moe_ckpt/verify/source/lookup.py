"""Where each weight of a checkpoint lies: by itself, or one of many in fused experts."""

from __future__ import annotations

from functools import cached_property

from ...dtypes import FLOATS
from ...errors import Problems
from ...formats import Part, without_input_scale
from ...layouts import SPLIT
from ...layouts.places import expert_modules, place_of_experts, place_of_linears
from ...source.headers import TensorInfo
from ...source.stored import Encoded, Place, Read, Slab, plain
from ..stacks import STACK_FORMS
from ..subject import Subject
from .matrices import Matrix

__all__ = ["Lookup", "expert_label"]


def expert_label(stack: str, expert: int) -> str:
    """What to call one of stacked experts."""
    return f"{stack}[expert {expert}]"


class Lookup:
    """Looks weights up by name.

    Experts that are stacked as ModelOpt does it, ``experts.gate_up_proj`` [E, K, N], are called
    what `expert_label` says; those in other fused tensors what they are called when split.
    """

    def __init__(self, subject: Subject) -> None:
        self._weights = subject.weights
        self._detection = subject.detection
        self._tensors = subject.source.tensors
        self._stacks: dict[str, tuple[Encoded, tuple[TensorInfo, ...]] | None] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is a weight of this name."""
        return name in self._weights.tensors or name in self._in_fused

    def encoded(self, name: str) -> Encoded:
        """How a weight is stored."""
        inside = self._in_fused.get(name)
        return inside.place.encoded if inside else self._weights.encoded(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        inside = self._in_fused.get(name)
        return (inside.rows, inside.place.columns) if inside else self._weights.tensors[name].shape

    def matrix(self, name: str) -> Matrix:
        """It, to be read."""
        stack, _, expert = name.partition("[expert ")
        if expert:
            return self._of_stack(stack, int(expert[:-1]))
        if name in self._in_fused:
            return self._in_fused[name]
        return Matrix(place_of_linears(self._weights, [name]), 0, 0)

    def parts(self, name: str) -> list[tuple[Part, TensorInfo, Read]]:
        """Its parts, the tensors that hold them, and where they lie there.

        None of a weight in fused experts that are not stacked.
        """
        stack, _, expert = name.partition("[expert ")
        if not expert and name in self._in_fused:
            return []
        matrix = self.matrix(name)
        if expert:
            infos = self._known(stack)[1]
        else:
            infos = tuple(info for _, info in self._weights.stored_as(name))
            infos = infos or (self._weights.tensors[name],)
        (reads,) = matrix.place.slabs[0].reads
        return list(zip(matrix.place.encoded.parts, infos, reads, strict=True))

    def tensor(self, name: str) -> str:
        """The tensor that holds its codes."""
        parts = self.parts(name)
        return parts[0][1].name if parts else name

    # Stacked experts

    def is_stacked(self, name: str) -> bool:
        """Whether experts are stacked in a tensor of this name."""
        if name not in self._stacks:
            self._stacks[name] = self._stack(name)
        return self._stacks[name] is not None

    def encoded_stack(self, name: str) -> Encoded:
        """How they are stored; items of the parts lie along columns."""
        return self._known(name)[0]

    def shape_of_stack(self, name: str) -> tuple[int, ...]:
        """E, K and N."""
        encoded, infos = self._known(name)
        e, items, n = infos[0].shape
        return e, items * encoded.parts[0].columns, n

    def tensors_of_stack(self, name: str) -> list[str]:
        """The tensors that hold them, those of input scales too."""
        return [*(info.name for info in self._known(name)[1]), f"{name}_input_scale"]

    def _known(self, name: str) -> tuple[Encoded, tuple[TensorInfo, ...]]:
        found = self._stacks[name] if self.is_stacked(name) else None
        assert found is not None
        return found

    def _stack(self, name: str) -> tuple[Encoded, tuple[TensorInfo, ...]] | None:
        codes = self._tensors.get(name)
        if codes is None or len(codes.shape) != 3:
            return None
        for form in STACK_FORMS:
            if codes.dtype != form.dtype:
                continue
            found = [(Part("qweight", codes.dtype, form.columns), codes)]
            for role, ending, dtype, columns in form.scales:
                info = self._tensors.get(name + ending)
                shape = form.scale_shape(codes, columns)
                if info is not None and (info.dtype, info.shape) == (dtype, shape):
                    found.append((Part(role, dtype, columns), info))
            # Without an input scale it can be compared all the same.
            missing = len(form.scales) + 1 - len(found)
            has_input = found[-1][0].role == "input_scale"
            if missing <= (not has_input):
                parts, infos = zip(*found[: len(form.scales)], strict=True)
                found_format = form.format if has_input else without_input_scale(form.format)
                return Encoded(found_format, parts), infos
        if codes.dtype in FLOATS:
            return plain(codes.dtype), (codes,)
        return None

    def _of_stack(self, name: str, expert: int) -> Matrix:
        encoded, infos = self._known(name)
        e, k, n = self.shape_of_stack(name)
        reads = []
        for part, info in zip(encoded.parts, infos, strict=True):
            nbytes = info.nbytes if part.is_scalar else info.nbytes // e
            start = 0 if part.is_scalar else expert * nbytes
            reads.append(Read(info.shard, info.offset + start, nbytes))
        slab = Slab((tuple(reads),), (expert_label(name, expert),))
        return Matrix(Place((slab,), (n,), (n,), k, encoded, is_transposed=True), 0, 0)

    # Other fused experts

    def fused_with(self, name: str) -> tuple[str, ...]:
        """The fused tensors of the experts that a weight is among; () if it is in none."""
        return self._tensors_in_fused.get(name, ())

    @cached_property
    def _in_fused(self) -> dict[str, Matrix]:
        return {name: matrix for name, (matrix, _) in self._fused.items()}

    @cached_property
    def _tensors_in_fused(self) -> dict[str, tuple[str, ...]]:
        return {name: tensors for name, (_, tensors) in self._fused.items()}

    @cached_property
    def _fused(self) -> dict[str, tuple[Matrix, tuple[str, ...]]]:
        found: dict[str, tuple[Matrix, tuple[str, ...]]] = {}
        if self._detection is None:
            return found
        for experts in self._detection.experts:
            if experts.layout == SPLIT:
                continue
            for side in experts.sides:
                place = place_of_experts(self._weights, experts, side, Problems())
                for expert in range(experts.num_experts):
                    for part, module in enumerate(expert_modules(experts, side, expert)):
                        matrix = Matrix(place, expert, part)
                        found[f"{module}.weight"] = matrix, experts.tensors
        return found
