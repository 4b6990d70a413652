"""The routed experts of one layer, as they were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .family import INTERLEAVED, LAYOUTS, SPLIT

__all__ = ["Experts", "Range", "Side"]


class Range(NamedTuple):
    """Contiguous items of a tensor."""

    tensor: str
    start: int
    num_items: int


@dataclass(frozen=True, slots=True)
class Side:
    """Projections that read the same input: gate and up, or down.

    ``rows`` holds N of each projection, ``columns`` is K. ``is_transposed``: stored [in, out].
    ``is_interleaved``: rows of the two alternate. ``bias`` is a tensor, or '' for none.
    """

    projections: tuple[str, ...]
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    is_transposed: bool
    is_interleaved: bool
    bias: str


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of one layer that have one width.

    ``gate_up`` and ``down`` hold the tensors in expert order: for each expert if split (gate and
    up of expert 0, then of 1, ...), else for all. ``biases`` are those of gate_up and of down, or
    nothing. ``first`` is the number of the first expert in the output.
    """

    layer: str
    source: str
    output: str
    projections: tuple[str, ...]
    layout: str
    order: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]
    biases: tuple[str, ...]
    first: int
    num_experts: int
    hidden: int
    intermediate: int
    evidence: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors of these experts."""
        return (*self.gate_up, *self.down, *self.biases)

    @property
    def is_interleaved(self) -> bool:
        """Whether rows of gate and up alternate."""
        return self.order == INTERLEAVED

    @property
    def sides(self) -> tuple[Side, Side]:
        """Gate and up (up alone without a gate), and down."""
        *reading, down = self.projections
        first, *_, last = LAYOUTS[self.layout].shapes
        I, H = self.intermediate, self.hidden
        gate_up_bias, down_bias = self.biases or ("", "")
        return (
            Side(
                projections=tuple(reading),
                tensors=self.gate_up,
                rows=(I,) * len(reading),
                columns=H,
                is_transposed=first[-1] != "H",
                is_interleaved=self.is_interleaved,
                bias=gate_up_bias,
            ),
            Side(
                projections=(down,),
                tensors=self.down,
                rows=(H,),
                columns=I,
                is_transposed=last[-1] != "I",
                is_interleaved=False,
                bias=down_bias,
            ),
        )

    def ranges(self, side: Side, expert: int) -> tuple[Range, ...]:
        """Where the matrices of one expert lie; one range if they are in one tensor."""
        items = sum(side.rows) * side.columns
        if self.layout == SPLIT:
            each = len(side.tensors) // self.num_experts
            names = side.tensors[expert * each : (expert + 1) * each]
            start, items = 0, items // each
        else:
            names = side.tensors
            items //= len(names)
            start = expert * items
        return tuple([Range(name, start, items) for name in names])
