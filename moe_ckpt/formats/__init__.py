"""Number formats: one row here, one module with the arithmetic beside it.

A row says, without torch, which tensors a quantized matrix becomes; its module holds the
`quantize`/`dequantize` pair. Formats know nothing of names, files or loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from ..dtypes import nbytes_of
from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from .scratch import Scratch

__all__ = ["FORMATS", "WHOLE_ROW", "Codec", "Part", "QuantFormat", "find_format"]

WHOLE_ROW = 1 << 62  # columns of a part that has one item for each row


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantized matrix [N, K].

    An item of it stands for ``rows`` x ``columns`` weights; at the edges for what is left of them.
    ``columns`` 0: one scalar for the matrix.
    """

    role: str
    dtype: str
    columns: int
    rows: int = 1

    @property
    def is_scalar(self) -> bool:
        """Whether the part is one number for the matrix."""
        return self.columns == 0

    @property
    def block(self) -> str:
        """The weights that an item stands for, in words."""
        if self.is_scalar:
            return "matrix"
        if self.columns == WHOLE_ROW:
            return "row"
        return f"{self.rows}x{self.columns}" if self.rows > 1 else f"{self.columns}"

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of this part for a matrix [N, K]; () for a scalar."""
        return () if self.is_scalar else (-(-n // self.rows), -(-k // self.columns))

    def row_nbytes(self, k: int) -> int:
        """Bytes of one row of this part, which covers ``rows`` of the matrix; 0 for a scalar."""
        return 0 if self.is_scalar else nbytes_of(self.dtype, self.shape(1, k))


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A number format as data.

    ``module``: the module with the arithmetic, and after a colon the codec in it, if there are
    several.
    ``activations``: what runtimes make of the activations.
    ``k_multiple``: K must be a multiple of it. ``n_multiple``: N must be, in every matrix that
    is followed by another one in the module that runtimes build.
    ``weight_bits``: bits of the code of one weight, without scales.
    ``input_scale``: each matrix carries a static activation scale.
    ``constant_input_scale``: without statistics, 1.0 is an accepted activation scale.
    ``shares_dense_amax``: linear layers that read the same input (q/k/v, gate/up) share one
    weight amax. The experts' gate and up share theirs in every format with one for a matrix.
    ``largest``: what a scale of 1 can hold, where a scale belongs to a whole matrix or row: it is
    amax / largest. 0 where scales belong to blocks only.
    ``amax_of_rows``: that scale belongs to a row.
    ``limit``: the largest magnitude of a weight that surely decodes to a finite number; codes that
    are rounded up stand for more than the weight.
    """

    name: str
    module: str
    summary: str
    activations: str
    weight_bits: int
    k_multiple: int
    parts: tuple[Part, ...]
    n_multiple: int = 1
    input_scale: bool = False
    constant_input_scale: bool = False
    shares_dense_amax: bool = False
    largest: float = 0.0
    amax_of_rows: bool = False
    limit: float = 3.4028234663852886e38

    def bits_per_weight(self) -> float:
        """Bits stored for one weight, what is stored once for a row or a matrix not counted."""
        wide = 1 << 30
        nbytes = sum(part.row_nbytes(wide) / part.rows for part in self.parts)
        return round(8 * nbytes / wide, 3)

    @property
    def row_step(self) -> int:
        """Rows that must stay together: those that share an item of some part."""
        return max(part.rows for part in self.parts)

    def codec(self) -> Codec:
        """The arithmetic; imports torch."""
        module, _, name = self.module.partition(":")
        found = import_module(f".{module}", __name__)
        codec: Codec = getattr(found, name) if name else found
        return codec


class Codec(Protocol):
    """What a format's module provides, for B matrices of [N, K]."""

    def quantize(
        self,
        weight_BNK: torch.Tensor,
        scale: torch.Tensor | None = None,
        out: Mapping[str, torch.Tensor] | None = None,
        scratch: Scratch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Parts with rows, by role, for bf16, fp16 or fp32 weights.

        ``scale`` is fp32, as `scales.scale_of` makes it: [B] if the format has a scale for each
        matrix, [B, N] if it has one for each row, and else None.
        """

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The fp32 weights [B, N, K] that the parts stand for; scalars are [B]."""


_NVFP4_PARTS = (
    Part("qweight", "U8", 2),
    Part("block_scale", "F8_E4M3", 16),
    Part("global_scale", "F32", 0),
)
_INPUT_SCALE = Part("input_scale", "F32", 0)
_LIMIT = 2.0**127


def _int4(group: int) -> QuantFormat:
    return QuantFormat(
        name=f"int4-g{group}",
        module=f"int4:G{group}",
        summary=f"4-bit integers, a scale per {group} weights",
        activations="16-bit",
        weight_bits=4,
        k_multiple=group,
        parts=(Part("qweight", "I32", 8), Part("block_scale", "BF16", group)),
        limit=_LIMIT,
    )


FORMATS: tuple[QuantFormat, ...] = (
    QuantFormat(
        name="nvfp4",
        module="nvfp4",
        summary="4-bit floats, a scale per 16 weights",
        activations="4-bit, static scale",
        weight_bits=4,
        k_multiple=16,
        parts=(*_NVFP4_PARTS, _INPUT_SCALE),
        input_scale=True,
        constant_input_scale=True,
        shares_dense_amax=True,
        largest=6.0 * 448.0,
    ),
    QuantFormat(
        name="nvfp4-w4a16",
        module="nvfp4",
        summary="4-bit floats, a scale per 16 weights",
        activations="16-bit",
        weight_bits=4,
        k_multiple=16,
        parts=_NVFP4_PARTS,
        shares_dense_amax=True,
        largest=6.0 * 448.0,
    ),
    QuantFormat(
        name="mxfp4",
        module="mxfp4",
        summary="4-bit floats, a power of two per 32 weights",
        activations="4-bit, dynamic",
        weight_bits=4,
        k_multiple=32,
        parts=(Part("qweight", "U8", 2), Part("block_scale", "U8", 32)),
        limit=_LIMIT,
    ),
    _int4(128),
    _int4(64),
    _int4(32),
    QuantFormat(
        name="fp8-block",
        module="fp8_block",
        summary="8-bit floats, a scale per 128x128 weights",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=128,
        n_multiple=128,
        parts=(Part("qweight", "F8_E4M3", 1), Part("block_scale", "F32", 128, 128)),
    ),
    QuantFormat(
        name="fp8-channel",
        module="fp8_channel",
        summary="8-bit floats, a scale per output row",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "F8_E4M3", 1), Part("channel_scale", "F32", WHOLE_ROW)),
        largest=448.0,
        amax_of_rows=True,
    ),
    QuantFormat(
        name="fp8-tensor",
        module="fp8_tensor",
        summary="8-bit floats, a scale per matrix",
        activations="8-bit, static scale",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "F8_E4M3", 1), Part("global_scale", "F32", 0), _INPUT_SCALE),
        input_scale=True,
        largest=448.0,
    ),
    QuantFormat(
        name="mxfp8",
        module="mxfp8",
        summary="8-bit floats, a power of two per 32 weights",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=32,
        parts=(Part("qweight", "F8_E4M3", 1), Part("block_scale", "U8", 32)),
        limit=_LIMIT,
    ),
    QuantFormat(
        name="int8-channel",
        module="int8_channel",
        summary="8-bit integers, a scale per output row",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "I8", 1), Part("channel_scale", "F32", WHOLE_ROW)),
        largest=127.5,
        amax_of_rows=True,
        limit=_LIMIT,
    ),
    QuantFormat(
        name="bf16",
        module="bf16",
        summary="not quantized: experts one by one, quantized sources decoded",
        activations="16-bit",
        weight_bits=16,
        k_multiple=1,
        parts=(Part("qweight", "BF16", 1),),
    ),
)


def find_format(name: str) -> QuantFormat:
    """The row of a format; `UsageError` lists the known ones."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise UsageError(f"format {name!r} is unknown; choose {', '.join(f.name for f in FORMATS)}")
