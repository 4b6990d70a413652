"""Number formats: one row here, one module with the arithmetic beside it.

A row says, without torch, which tensors a quantized matrix becomes; its module holds the
`quantize`/`dequantize` pair. Formats know nothing of names, files or loaders.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from ..dtypes import nbytes_of
from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from .scratch import Scratch

__all__ = ["FORMATS", "Codec", "Part", "QuantFormat", "find_format"]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantized matrix [N, K].

    ``columns_per_item`` is how many columns of K one stored item covers; 0 for one scalar
    per matrix.
    """

    role: str
    dtype: str
    columns_per_item: int

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of this part for a matrix [N, K]."""
        return (n, k // self.columns_per_item) if self.columns_per_item else ()

    def row_nbytes(self, k: int) -> int:
        """Bytes of one row of this part; 0 for a scalar."""
        return nbytes_of(self.dtype, (k // self.columns_per_item,)) if self.columns_per_item else 0


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A number format as data.

    ``k_multiple``: K must be a multiple of it.
    ``input_scale``: each matrix carries a static activation scale.
    ``constant_input_scale``: without statistics, 1.0 is an accepted activation scale.
    ``shares_dense_amax``: linear layers that read the same input (q/k/v, gate/up) share one
    weight amax. The experts' gate and up share theirs in every format.
    """

    name: str
    module: str
    summary: str
    k_multiple: int
    parts: tuple[Part, ...]
    input_scale: bool
    constant_input_scale: bool
    shares_dense_amax: bool

    def bits_per_weight(self) -> float:
        """Bits stored for one weight, scalars not counted."""
        wide = 1 << 20
        return 8 * sum(part.row_nbytes(wide) for part in self.parts) / wide

    def codec(self) -> Codec:
        """The module with the arithmetic; imports torch."""
        codec: Codec = import_module(f".{self.module}", __name__)
        return codec


class Codec(Protocol):
    """What a format's module provides. B matrices of [N, K] share one amax each."""

    def quantize(
        self,
        weight_BNK: torch.Tensor,
        amax_B: torch.Tensor,
        out: dict[str, torch.Tensor] | None = None,
        scratch: Scratch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Parts with rows, by role, for bf16, fp16 or fp32 weights and their fp32 amax."""

    def weight_scales(self, amax_B: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalar parts of the weights, by role: fp32 [B]."""

    def input_scale(self, amax_B: torch.Tensor) -> torch.Tensor:
        """Activation scales, fp32 [B], from activation amax."""

    def dequantize(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The fp32 weights [B, N, K] that the parts stand for."""


_NVFP4_PARTS = (
    Part("qweight", "U8", 2),
    Part("block_scale", "F8_E4M3", 16),
    Part("global_scale", "F32", 0),
)
_INPUT_SCALE = Part("input_scale", "F32", 0)

FORMATS: tuple[QuantFormat, ...] = (
    QuantFormat(
        name="nvfp4",
        module="nvfp4",
        summary="4-bit weights and activations, a scale per 16 weights",
        k_multiple=16,
        parts=(*_NVFP4_PARTS, _INPUT_SCALE),
        input_scale=True,
        constant_input_scale=True,
        shares_dense_amax=True,
    ),
    QuantFormat(
        name="nvfp4-w4a16",
        module="nvfp4",
        summary="4-bit weights, 16-bit activations",
        k_multiple=16,
        parts=_NVFP4_PARTS,
        input_scale=False,
        constant_input_scale=False,
        shares_dense_amax=True,
    ),
    QuantFormat(
        name="fp8-tensor",
        module="fp8_tensor",
        summary="8-bit weights and activations, a scale per matrix",
        k_multiple=1,
        parts=(Part("qweight", "F8_E4M3", 1), Part("global_scale", "F32", 0), _INPUT_SCALE),
        input_scale=True,
        constant_input_scale=False,
        shares_dense_amax=False,
    ),
)


def find_format(name: str) -> QuantFormat:
    """The row of a format; `UsageError` lists the known ones."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise UsageError(f"format {name!r} is unknown; choose {', '.join(f.name for f in FORMATS)}")
