"""How large the scales of a tensor are: the smallest, the largest and the usual one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...source.items import numbers

__all__ = ["Level", "joined", "level_of"]

_SAMPLE = 1 << 14


class Level(NamedTuple):
    """Scales of a tensor. ``log2_sum`` is that of ``sampled`` of those above 0."""

    smallest: float
    largest: float
    log2_sum: float
    sampled: int

    @property
    def usual(self) -> float:
        """Their geometric mean, which a single outlier does not move."""
        return float(2 ** (self.log2_sum / self.sampled)) if self.sampled else 0.0


def level_of(items: NDArray[Any], dtype: str) -> Level:
    """The level of items of a dtype of safetensors; the mean is that of an even sample."""
    if items.dtype == np.uint8:  # codes of numbers above 0 are ordered as these are
        ends = numbers(np.array([items.min(), items.max()], np.uint8), dtype)
    else:
        found = numbers(items, dtype)
        ends = np.array([found.min(), found.max()])
    sample = numbers(items[:: -(-len(items) // _SAMPLE)], dtype)
    sample = sample[sample > 0]
    log2_sum = float(np.log2(sample, dtype=np.float64).sum())
    return Level(float(ends[0]), float(ends[1]), log2_sum, len(sample))


def joined(levels: Iterable[Level]) -> Level:
    """The level of a tensor of which these are pieces."""
    smallest, largest, sums, counts = zip(*levels, strict=True)
    return Level(min(smallest), max(largest), sum(sums), sum(counts))
