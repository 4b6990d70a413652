"""transformers' loader."""

from __future__ import annotations

from ..dialects.dialect import MODELOPT
from ..formats import FORMATS
from ..runtimes import TRANSFORMERS
from .everywhere import PLAIN_EVERYWHERE, ROUTER
from .loader import Limit, Loader, Plain

__all__ = ["TRANSFORMERS_LOADER"]

_PACKED = tuple(row.name for row in FORMATS if row.weight_bits == 4)
_BYTES = tuple(row.name for row in FORMATS if row.weight_bits == 8)
_STOPS = "it knows no quant_method modelopt, and stops at codes of another shape than its weights"
_TAKES = "it knows no quant_method modelopt: it warns, and takes the codes for weights"
_LINEAR_ROUTERS = (
    *("afmoe", "dbrx", "diffusion_gemma", "gemma4", "gemma4_text", "hunyuan_v1_moe", "jetmoe"),
    *("llama4", "llama4_text", "longcat_flash", "phimoe", "zaya"),
)

TRANSFORMERS_LOADER = Loader(
    TRANSFORMERS,
    "5.23.0",
    is_run=True,
    # Routers are classes of their own, but in these families.
    plain=(*PLAIN_EVERYWHERE, Plain((), ROUTER, besides=_LINEAR_ROUTERS)),
    limits=(
        Limit(_STOPS, methods=(MODELOPT,), formats=_PACKED),
        Limit(_STOPS, methods=(MODELOPT,), formats=_PACKED, modules=""),
        Limit(_TAKES, methods=(MODELOPT,), formats=_BYTES, is_garbage=True),
        Limit(_TAKES, methods=(MODELOPT,), formats=_BYTES, modules="", is_garbage=True),
    ),
)
