"""How far decoded weights are from those of the source: errors, their bound, and the SNR."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log10
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formats import find_format
from ...formats.bounds import BF16_ROUNDOFF, largest_errors
from ...source.stored import Encoded
from .matrices import Matrix, MatrixReader

__all__ = ["Distance", "Worst", "distance"]

_LEAST_DB = -200.0
_CHUNK_ITEMS = 1 << 18  # a dozen arrays of so many floats fit the cache


class Worst(NamedTuple):
    """The weight that is furthest beyond its bound; ``excess`` is error / bound."""

    excess: float
    row: int
    column: int
    expected: float
    found: float


@dataclass(slots=True)
class Distance:
    """How far a matrix is from its source.

    ``signal`` and ``noise`` are sums of squares, ``largest`` is the source's largest magnitude,
    ``beyond`` counts weights whose error is beyond the bound, ``lost`` those that are not 0 in the
    source and 0 here, of ``present`` that are not.
    """

    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    beyond: int = 0
    present: int = 0
    lost: int = 0
    worst: Worst | None = None

    @property
    def snr_db(self) -> float:
        """The signal-to-noise ratio in decibel: infinite without error, and at least -200."""
        if self.noise == 0:
            return inf
        if not np.isfinite(self.noise) or self.signal == 0:
            return _LEAST_DB
        return max(round(10 * log10(self.signal / self.noise), 2), _LEAST_DB)

    def add(
        self,
        first_row: int,
        expected: NDArray[np.float32],
        found: NDArray[np.float32],
        magnitude: NDArray[np.float32],
        bound: NDArray[np.float32] | None,
    ) -> None:
        """Take account of some rows, all [rows, K]."""
        error = np.abs(expected - found)
        self.count += expected.size
        self.signal += _power(expected)
        self.noise += _power(error)
        is_present = expected != 0
        self.present += int(np.count_nonzero(is_present))
        self.lost += int(np.count_nonzero(is_present & (found == 0)))
        self.largest = max(self.largest, float(magnitude.max(initial=0)))
        if bound is None:
            return
        within = error <= bound
        if within.all():
            return
        # A scale of 0 has no bound, and stands for weights of 0.
        beyond = ~(within | (expected == found))
        count = int(np.count_nonzero(beyond))
        if not count:
            return
        self.beyond += count
        ratio = np.where(beyond, error / bound, 0)
        np.nan_to_num(ratio, copy=False, nan=np.inf, posinf=np.inf)
        row, column = np.unravel_index(int(ratio.argmax()), ratio.shape)
        excess = float(ratio[row, column])
        if self.worst is None or excess > self.worst.excess:
            values = float(expected[row, column]), float(found[row, column])
            self.worst = Worst(excess, first_row + int(row), int(column), *values)


def distance(
    source: MatrixReader,
    wanted: Matrix,
    there: MatrixReader,
    matrix: Matrix,
    *,
    chunk_items: int = _CHUNK_ITEMS,
    is_bounded: bool = True,
) -> Distance:
    """Compare two matrices of the same shape, each from its own checkpoint.

    ``is_bounded``: whether errors are held against the bound.
    """
    found = Distance()
    ours, theirs = wanted.place.encoded, matrix.place.encoded
    step = max(1, min(_CHUNK_ITEMS, chunk_items) // max(matrix.place.columns, 1))
    slack = _slack(ours, theirs)
    codes = find_format(theirs.format).codes
    with np.errstate(all="ignore"):  # whatever is no number is beyond its bound
        for start in range(0, matrix.rows, step):
            stop = min(start + step, matrix.rows)
            expected = source.values(wanted, start, stop)
            values = there.values(matrix, start, stop)
            magnitude = np.abs(expected)
            bound = None
            if is_bounded and codes is None:
                bound = magnitude * np.float32(slack)
            elif is_bounded and codes is not None:
                scale = there.scales(matrix, start, stop, codes.one)
                bound = largest_errors(codes, magnitude, scale, slack)
            found.add(start, expected, values, magnitude, bound)
    return found


def _power(values: NDArray[np.float32]) -> float:
    """The sum of squares; in float32, which is faster, unless it leaves its range."""
    flat = values.reshape(-1)
    found = float(np.dot(flat, flat))
    if 1e-20 < found < 1e30:
        return found
    return float(np.square(flat, dtype=np.float64).sum())


def _slack(ours: Encoded, theirs: Encoded) -> float:
    """How far a weight may have moved before it was rounded to its code, relative to it.

    Producers decode to bf16 what is quantized in the source, divide by the scale in bf16, and
    some store a scale in fewer bits than they divided by.
    """
    if theirs.is_plain:
        return 0.0 if ours.is_plain else 2 * BF16_ROUNDOFF
    scales = {part.dtype for part in theirs.parts if part.role.endswith("_scale")}
    roundings = 1 + (not ours.is_plain) + bool(scales & {"BF16", "F16"})
    return roundings * BF16_ROUNDOFF
