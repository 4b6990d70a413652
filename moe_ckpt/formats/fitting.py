"""Which formats fit the sizes of a matrix, and how far runtimes can shard it."""

from __future__ import annotations

from collections.abc import Sequence

from . import FORMATS, QuantFormat

__all__ = ["formats_that_fit", "tensor_parallel_sizes"]

_SIZES = (1, 2, 4, 8, 16, 32)


def tensor_parallel_sizes(number_format: QuantFormat, intermediate: int) -> tuple[int, ...]:
    """Tensor-parallel sizes that leave experts' I in blocks of the format on every device.

    >>> tensor_parallel_sizes(next(f for f in FORMATS if f.name == "fp8-block"), 768)
    (1, 2)
    """
    step = max(number_format.k_multiple, number_format.n_multiple)
    return tuple(tp for tp in _SIZES if intermediate % tp == 0 and intermediate // tp % step == 0)


def formats_that_fit(shapes: Sequence[tuple[int, ...]]) -> str:
    """Formats for matrices of these shapes [N, K], as text, with tensor-parallel sizes.

    The last shape decides those: experts are sharded along the K of down.
    """
    found: dict[tuple[int, ...], list[str]] = {}
    for row in FORMATS:
        fits = all(n % row.n_multiple == 0 and k % row.k_multiple == 0 for n, k in shapes)
        if fits and row.is_quantized:
            found.setdefault(tensor_parallel_sizes(row, shapes[-1][1]), []).append(row.name)
    named = (
        f"{', '.join(names)} (tensor parallel {', '.join(map(str, sizes))})"
        for sizes, names in found.items()
    )
    return f"--format {' or '.join(named)}"
