"""The routed experts of one layer, as they were found."""

from __future__ import annotations

from dataclasses import dataclass

from .family import INTERLEAVED, LAYOUTS, SPLIT

__all__ = ["Experts", "Range"]


@dataclass(frozen=True, slots=True)
class Range:
    """Contiguous items of a tensor."""

    tensor: str
    start: int
    count: int


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
    def gate_up_rows(self) -> tuple[int, ...]:
        """Rows of gate and of up, or of up alone."""
        return (self.intermediate,) * (len(self.projections) - 1)

    @property
    def stores_transposed(self) -> tuple[bool, bool]:
        """Whether gate and up, and down, are stored [in, out]."""
        first, *_, last = LAYOUTS[self.layout].shapes
        return first[-1] != "H", last[-1] != "I"

    @property
    def is_interleaved(self) -> bool:
        """Whether rows of gate and up alternate."""
        return self.order == INTERLEAVED

    def gate_up_ranges(self, expert: int) -> tuple[Range, ...]:
        """Where gate, then up, of one expert lie; one range if they are in one tensor."""
        rows = sum(self.gate_up_rows)
        return self._ranges(self.gate_up, expert, rows * self.hidden)

    def down_ranges(self, expert: int) -> tuple[Range, ...]:
        """Where down of one expert lies."""
        return self._ranges(self.down, expert, self.hidden * self.intermediate)

    def _ranges(self, tensors: tuple[str, ...], expert: int, items: int) -> tuple[Range, ...]:
        if self.layout == SPLIT:
            each = len(tensors) // self.num_experts
            names = tensors[expert * each : (expert + 1) * each]
            return tuple(Range(name, 0, items // each) for name in names)
        items //= len(tensors)
        return tuple(Range(name, expert * items, items) for name in tensors)
