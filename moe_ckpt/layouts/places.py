"""Where the matrices of a checkpoint lie: those of experts, and linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CheckpointError, Problems, show, show_some
from ..source.stored import Encoded, Place, Slab
from ..source.weights import Weights
from .experts import Experts, Range, Side
from .family import SPLIT

__all__ = ["expert_modules", "place_of_experts", "place_of_linears"]


def expert_modules(found: Experts, side: Side, expert: int) -> tuple[str, ...]:
    """The output modules of one side of an expert, such as its gate and its up."""
    module = f"{found.output}.{found.first + expert}"
    return tuple([f"{module}.{name}" for name in side.projections])


def place_of_linears(weights: Weights, names: Sequence[str]) -> Place:
    """Weights [N, K] of linear layers, stored alike, as one slab."""
    tensors = weights.tensors
    rows = tuple([tensors[name].shape[0] for name in names])
    slab = Slab(tuple(map(weights.reads, names)), tuple(names))
    first = names[0]
    return Place((slab,), rows, rows, tensors[first].shape[1], weights.encoded(first))


def place_of_experts(
    weights: Weights,
    found: Experts,
    side: Side,
    problems: Problems,
    *,
    in_one_piece: bool = False,
) -> Place:
    """One side of a layer's experts, each a slab; that they cannot be read so is a problem.

    ``in_one_piece``: gate and up stay one matrix, interleaved or not.
    """
    encoded = _encoding_of(weights, found, side, problems)
    slabs = []
    for expert in range(found.num_experts):
        ranges = found.ranges(side, expert)
        labels = tuple([_label(range_, found, expert) for range_ in ranges])
        slabs.append(Slab(tuple([weights.reads(*range_) for range_ in ranges]), labels))
    return Place(
        slabs=tuple(slabs),
        source_rows=tuple(range_.num_items // side.columns for range_ in ranges),
        rows=(sum(side.rows),) if in_one_piece else side.rows,
        columns=side.columns,
        encoded=encoded,
        is_transposed=side.is_transposed,
        is_interleaved=side.is_interleaved and not in_one_piece,
    )


def _encoding_of(weights: Weights, found: Experts, side: Side, problems: Problems) -> Encoded:
    encodings = {weights.encoded(name): name for name in side.tensors}
    if len(encodings) > 1:
        kinds = [
            f"{name} ({weights.what_is(name) or encoded.parts[0].dtype})"
            for encoded, name in encodings.items()
        ]
        problems.add(
            CheckpointError,
            f"{show(found.source)}: {'/'.join(side.projections)} of its experts are stored in "
            f"different ways: {show_some(kinds)}",
        )
    encoded, name = next(iter(encodings.items()))
    if side.is_transposed and not encoded.is_plain:
        problems.add(
            CheckpointError,
            f"{show(name)}: is {weights.what_is(name)}, stored [in, out]; quantized "
            "experts are read only as [out, in]; start from the original release",
        )
    return encoded


def _label(range_: Range, found: Experts, expert: int) -> str:
    return range_.tensor if found.layout == SPLIT else f"{range_.tensor}[expert {expert}]"
