"""What a number format is: a row of data, and the arithmetic that its module holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from ..dtypes import nbytes_of

if TYPE_CHECKING:
    import torch

    from .scratch import Scratch

__all__ = ["UNQUANTIZED", "WHOLE_ROW", "Codec", "Codes", "Part", "QuantFormat"]

# The format of weights that are not quantized, whatever their dtype.
UNQUANTIZED = "bf16"

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
class Codes:
    """The numbers that the codes of one kind stand for, before any scale.

    ``one`` is the byte that codes of 1 are made of, ``largest`` the largest code.
    ``mantissa_bits`` and ``least_exponent`` are those of floating-point codes; integers have the
    step 1 of floats whose exponent is always 0 and whose mantissa has no bits.
    ``least_snr_db``: what is below it is no rounding, whatever the weights.
    """

    one: int
    largest: float
    mantissa_bits: int
    least_exponent: int
    least_snr_db: float
    is_integer: bool = False


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """A number format as data.

    ``module``: the module of this folder with the arithmetic, by which kernels are found too.
    ``group``: which of the module's codecs it is, where it has one for each size of a group.
    ``activations``: what runtimes make of the activations.
    ``k_multiple``: K must be a multiple of it. ``n_multiple``: N must be, in every matrix that
    is followed by another one in the module that runtimes build.
    ``weight_bits``: bits of the code of one weight, without scales.
    ``codes``: what the codes stand for, and so how far rounding may move a weight; None if the
    weights are not quantized.
    ``input_scale``: each matrix carries a static activation scale.
    ``constant_input_scale``: without statistics, 1.0 is an accepted activation scale.
    ``same_weights_as``: the format that differs from this one in the activations only.
    ``exact_from``: formats whose weights this one can hold as they are.
    ``keeps_dtype_of``: the part that keeps the dtype it has in a source of the same weights.
    ``shares_dense_amax``: linear layers that read the same input (q/k/v, gate/up) share one
    weight amax, for runtimes keep one scale. The experts' gate and up share theirs in every
    format with one for a matrix.
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
    codes: Codes | None = None
    group: int = 0
    n_multiple: int = 1
    input_scale: bool = False
    constant_input_scale: bool = False
    same_weights_as: str = ""
    exact_from: tuple[str, ...] = ()
    keeps_dtype_of: str = ""
    shares_dense_amax: bool = False
    largest: float = 0.0
    amax_of_rows: bool = False
    limit: float = 3.4028234663852886e38

    @property
    def is_quantized(self) -> bool:
        """Whether weights are rounded to codes."""
        return self.name != UNQUANTIZED

    @property
    def weights(self) -> str:
        """The name that all formats with these codes and scales share."""
        return self.same_weights_as or self.name

    @property
    def scale(self) -> Part | None:
        """The part that holds the finest scale of the weights; None if they have none."""
        scales = (p for p in self.parts if p.role.endswith("scale") and p.role != "input_scale")
        return next(scales, None)

    @property
    def row_step(self) -> int:
        """Rows that must stay together: those that share an item of some part."""
        return max(part.rows for part in self.parts)

    def bits_per_weight(self) -> float:
        """Bits stored for one weight, what is stored once for a row or a matrix not counted."""
        wide = 1 << 30
        nbytes = sum(part.row_nbytes(wide) / part.rows for part in self.parts)
        return round(8 * nbytes / wide, 3)

    def holds(self, source: QuantFormat) -> bool:
        """Whether weights of a source's format become this one without being rounded anew."""
        return source.weights == self.weights or source.weights in self.exact_from

    def codec(self) -> Codec:
        """The arithmetic; imports torch."""
        module = import_module(f".{self.module}", __package__)
        codec: Codec = module.of_group(self.group) if self.group else module
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
