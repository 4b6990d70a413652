"""vLLM's loader."""

from __future__ import annotations

from ..runtimes import VLLM
from .loader import Limit, Loader, Plain

__all__ = ["VLLM_LOADER"]

VLLM_LOADER = Loader(
    VLLM,
    "0.33.0",
    is_run=True,
    plain=(Plain(("jamba",), r"\.mamba\."),),  # MambaMixer is built without the configuration
    limits=(Limit("it drops e_score_correction_bias of the router", ("laguna",), is_garbage=True),),
    converts=(("U8", "F8_E8M0"),),
)
