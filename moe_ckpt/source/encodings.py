"""How quantized checkpoints store weights: a table of what lies beside the codes.

An encoding is a number format of ours and the spelling of one producer or loader: which tensors,
called what, of which dtypes. Names, dtypes and shapes decide which one a weight has; what the
config says is checked against it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..formats import WHOLE_ROW, Part
from .headers import TensorInfo

__all__ = ["ENCODINGS", "SCALE_ENDINGS", "Encoding", "Scale"]

_FLOATS = ("F32", "BF16", "F16")
_E8M0 = ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor beside the codes: a part of the format, its ending, and the dtypes it may have."""

    role: str
    ending: str
    dtypes: tuple[str, ...]
    columns: int
    rows: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the columns must be a multiple of those of an item."""
        return self.rows == 1 and self.columns not in (0, WHOLE_ROW)

    def part(self, dtype: str) -> Part:
        """The part of a matrix that such a tensor holds."""
        return Part(self.role, dtype, self.columns, self.rows)


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to store quantized weights.

    ``ending`` is what follows the weight's name in that of its codes, ``columns`` how many
    weights one item of the codes holds. ``inverse``: roles that hold the reciprocal.
    """

    name: str
    format: str
    ending: str
    dtype: str
    columns: int
    scales: tuple[Scale, ...]
    inverse: tuple[str, ...] = ()

    def sizes(self, codes: TensorInfo) -> tuple[tuple[int, ...], int, int] | None:
        """Leading dimensions, N and K of the weights with these codes; None if there are none."""
        shape = codes.shape
        if self.ending == "_blocks":  # [..., K / 32, 16]
            shape = (*shape[:-2], shape[-2] * shape[-1]) if len(shape) > 2 else ()
        if len(shape) not in (2, 3) or not all(shape):
            return None
        return shape[:-2], shape[-2], shape[-1] * self.columns

    def fits(self, codes: TensorInfo, beside: Mapping[str, TensorInfo]) -> bool:
        """Whether these are such codes and their scales; ``beside`` has those by their endings."""
        sizes = self.sizes(codes) if codes.dtype == self.dtype else None
        if sizes is None:
            return False
        lead, n, k = sizes
        for scale in self.scales:
            info = beside.get(scale.ending)
            if info is None or info.dtype not in scale.dtypes:
                return False
            if scale.is_whole and k % scale.columns:
                return False
            if info.shape not in self.spellings(scale, lead, n, k):
                return False
        return True

    def spellings(
        self, scale: Scale, lead: tuple[int, ...], n: int, k: int
    ) -> set[tuple[int, ...]]:
        """The shapes that a scale may have beside weights [*lead, N, K]."""
        return _spellings(lead, scale.part(scale.dtypes[0]).shape(n, k))


def _spellings(lead: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes in which a part is found: [] or [1], [N, 1] or [N], [N, K] or [N, 1, K, 1].

    Not [1, N] for [N, 1]: those would be scales of columns.
    """
    found = [shape, tuple(size for size in shape if size != 1)]
    found.append(tuple(size for each in shape for size in (each, 1)))
    if not found[1]:
        found += [(1,), (1, 1)]
    return {(*lead, *each) for each in found}


_INT4 = tuple(
    Encoding(
        f"int4 of compressed-tensors, groups of {group}",
        f"int4-g{group}",
        "_packed",
        "I32",
        8,
        (Scale("block_scale", "_scale", _FLOATS, group),),
    )
    for group in (128, 64, 32)
)

# The first that fits counts.
ENCODINGS: tuple[Encoding, ...] = (
    Encoding(
        "FP8 in blocks",
        "fp8-block",
        "",
        "F8_E4M3",
        1,
        (Scale("block_scale", "_scale_inv", (*_FLOATS, "F8_E8M0"), 128, 128),),
    ),
    Encoding("MXFP8", "mxfp8", "", "F8_E4M3", 1, (Scale("block_scale", "_scale_inv", _E8M0, 32),)),
    Encoding("MXFP8", "mxfp8", "", "F8_E4M3", 1, (Scale("block_scale", "_scale", _E8M0, 32),)),
    Encoding(
        "FP8 per tensor",
        "fp8-tensor",
        "",
        "F8_E4M3",
        1,
        (Scale("global_scale", "_scale", _FLOATS, 0),),
    ),
    Encoding(
        "FP8 per channel",
        "fp8-channel",
        "",
        "F8_E4M3",
        1,
        (Scale("channel_scale", "_scale", _FLOATS, WHOLE_ROW),),
    ),
    Encoding(
        "FP8 in blocks",
        "fp8-block",
        "",
        "F8_E4M3",
        1,
        (Scale("block_scale", "_scale", _FLOATS, 128, 128),),
    ),
    Encoding(
        "NVFP4 of ModelOpt",
        "nvfp4",
        "",
        "U8",
        2,
        (
            Scale("block_scale", "_scale", ("F8_E4M3",), 16),
            Scale("global_scale", "_scale_2", ("F32",), 0),
        ),
    ),
    Encoding(
        "NVFP4 of compressed-tensors",
        "nvfp4",
        "_packed",
        "U8",
        2,
        (
            Scale("block_scale", "_scale", ("F8_E4M3",), 16),
            Scale("global_scale", "_global_scale", ("F32",), 0),
        ),
        inverse=("global_scale", "input_scale"),
    ),
    Encoding(
        "MXFP4 of ModelOpt", "mxfp4", "", "U8", 2, (Scale("block_scale", "_scale", _E8M0, 32),)
    ),
    Encoding(
        "MXFP4 of compressed-tensors",
        "mxfp4",
        "_packed",
        "U8",
        2,
        (Scale("block_scale", "_scale", _E8M0, 32),),
    ),
    Encoding(
        "MXFP4, as gpt-oss is released",
        "mxfp4",
        "_blocks",
        "U8",
        2,
        (Scale("block_scale", "_scales", _E8M0, 32),),
    ),
    *_INT4,
    Encoding(
        "int8 of compressed-tensors",
        "int8-channel",
        "",
        "I8",
        1,
        (Scale("channel_scale", "_scale", _FLOATS, WHOLE_ROW),),
    ),
)

# Tensors with these endings mean nothing without their weight.
SCALE_ENDINGS = (
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "_proj_scale_inv",
    "_proj_blocks",
    "_proj_scales",
)
