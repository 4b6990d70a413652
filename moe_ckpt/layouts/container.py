"""The experts of one layer: their tensors, and the sizes those must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..dtypes import FLOATS
from ..errors import LayoutError, show, show_some
from ..headers import TensorInfo
from .sizes import Sizes
from .table import Family

__all__ = ["Container", "Experts", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Contiguous rows of a tensor seen as a matrix [-1, K]."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer.

    ``gate_up`` and ``down`` hold the tensors: one each if fused, else 2E (gate, up of expert 0,
    then 1, ...) and E.
    """

    layer: str
    source: str
    output: str
    projections: tuple[str, str, str]
    form: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]
    num_experts: int
    hidden: int
    intermediate: int
    evidence: str

    def gate_up_rows(self, expert: int) -> tuple[Rows, ...]:
        """The rows [2I, H] of gate, then up, of one expert."""
        rows = self.intermediate
        if self.form == "fused":
            return (Rows(self.gate_up[0], expert * 2 * rows, 2 * rows),)
        return tuple(Rows(name, 0, rows) for name in self.gate_up[2 * expert : 2 * expert + 2])

    def down_rows(self, expert: int) -> tuple[Rows, ...]:
        """The rows [H, I] of down of one expert."""
        if self.form == "fused":
            return (Rows(self.down[0], expert * self.hidden, self.hidden),)
        return (Rows(self.down[expert], 0, self.hidden),)


class Container:
    """Tensors that may be the experts of one layer, before they are checked."""

    def __init__(self, layer: str, source: str, form: str) -> None:
        self.layer, self.source, self.form = layer, source, form
        self.members: dict[tuple[int, int], str] = {}  # (expert or -1, position) -> tensor

    def check(self, tensors: Mapping[str, TensorInfo], family: Family, sizes: Sizes) -> Experts:
        """The experts, if they are complete and of the sizes that config.json names.

        Raises:
            LayoutError: with the shapes found and those expected.
        """
        members = self.members
        gate_up: tuple[str, ...]
        down: tuple[str, ...]
        dtypes = {tensors[name].dtype for name in members.values()}
        if not dtypes <= FLOATS or len(dtypes) > 1:
            raise LayoutError(
                f"{show(self.source)}: experts are stored as {', '.join(sorted(dtypes))}; expected "
                "BF16, F16 or F32 throughout. Quantized or packed experts are not supported"
            )
        if self.form == "fused":
            E, H, I, shapes = self._fused_sizes(tensors, family)
            gate_up, down = (members[-1, 0],), (members[-1, 1],)
        else:
            E, H, I, shapes = self._split_sizes(tensors)
            gate_up = tuple(members[e, p] for e in range(E) for p in (0, 1))
            down = tuple(members[e, 2] for e in range(E))
        for what, value, known in (
            ("experts", E, sizes.experts),
            ("rows of gate (I)", I, sizes.intermediate),
            ("columns of gate (H)", H, sizes.hidden),
        ):
            if value not in known:
                listed = ", ".join(f"{key}={number}" for number, key in known.items()) or "nothing"
                raise LayoutError(
                    f"{show(self.source)}: {shapes} has {value} {what}, config.json says {listed}"
                )
        evidence = (
            f"{shapes}; E={E} ({sizes.experts[E]}), I={I} ({sizes.intermediate[I]}), "
            f"H={H} ({sizes.hidden[H]})"
        )
        return Experts(
            layer=self.layer,
            source=self.source,
            output=f"{self.layer}.{family.split}",
            projections=family.projections,
            form=self.form,
            gate_up=gate_up,
            down=down,
            num_experts=E,
            hidden=H,
            intermediate=I,
            evidence=evidence,
        )

    def _fused_sizes(
        self, tensors: Mapping[str, TensorInfo], family: Family
    ) -> tuple[int, int, int, str]:
        if len(self.members) != 2:
            raise LayoutError(
                f"{show(self.source)}: only {show_some(self.members.values())} is there; fused "
                "experts need gate_up and down"
            )
        first, second = (tensors[self.members[-1, p]] for p in (0, 1))
        shapes = (
            f"{show(first.name)} {list(first.shape)} with {show(second.name.split('.')[-1])} "
            f"{list(second.shape)}"
        )
        if len(first.shape) != 3 or len(second.shape) != 3 or 0 in first.shape + second.shape:
            raise LayoutError(f"{shapes}: expected two 3-D tensors, [E, 2I, H] and [E, H, I]")
        (E, a, b), (E2, c, d) = first.shape, second.shape
        if E != E2:
            raise LayoutError(f"{shapes}: the numbers of experts differ, {E} and {E2}")
        if a != 2 * d or b != c:
            transposed = b == 2 * c and a == d
            stored = "stored transposed, [E, H, 2I] and [E, I, H]" if transposed else "neither"
            raise LayoutError(
                f"{shapes}: expected [E, 2I, H] and [E, H, I]; these are {stored}, which this "
                "version does not convert"
            )
        if family.either_orientation and (a == b or c == d):
            raise LayoutError(
                f"{shapes}: one of them is square, and {family.name} files exist in both "
                "orientations; the shapes cannot tell which this is"
            )
        return E, b, d, shapes

    def _split_sizes(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int, int, str]:
        ids = {expert for expert, _ in self.members}
        E = max(ids) + 1
        missing = E * 3 - len(self.members)
        if missing:
            e, p = next((e, p) for e in range(E) for p in range(3) if (e, p) not in self.members)
            raise LayoutError(
                f"{show(self.source)}: {missing} of {E * 3} expert matrices are missing, first "
                f"{('gate', 'up', 'down')[p]} of expert {e}"
            )
        gate, up, down = (tensors[self.members[0, p]].shape for p in range(3))
        shapes = f"{show(self.source)}.0 {list(gate)}, {list(up)}, {list(down)}"
        if len(gate) != 2 or gate != up or down != gate[::-1] or 0 in gate:
            raise LayoutError(f"{shapes}: expected gate [I, H], up [I, H] and down [H, I]")
        for (_, p), name in self.members.items():
            if tensors[name].shape != (gate, up, down)[p]:
                raise LayoutError(
                    f"{show(name)}: is {list(tensors[name].shape)}, expert 0 has "
                    f"{list((gate, up, down)[p])}"
                )
        return E, gate[1], gate[0], shapes
