"""What every runtime builds in 16 bits, of every model."""

from __future__ import annotations

from ..dialects.dialect import COMPRESSED_TENSORS, FP8
from .loader import Plain

__all__ = ["PLAIN_EVERYWHERE", "ROUTER"]

# The router of a layer, and not the gate of a shared expert.
ROUTER = r"\.gate(\.wg)?$|\.router(\.(gate|layer|proj|classifier))?$"


# Of multi-token prediction: a linear layer of torch's, and a head, which these methods leave alone.
PLAIN_EVERYWHERE = (
    Plain((), r"\.eh_proj$"),
    Plain((), r"\.shared_head\.head$", (FP8, COMPRESSED_TENSORS)),
)
