"""vLLM's loader."""

from __future__ import annotations

from ..dialects.dialect import COMPRESSED_TENSORS, FP8, MODELOPT
from ..runtimes import VLLM
from .everywhere import PLAIN_EVERYWHERE, PLAIN_ROUTERS, ROUTER
from .loader import Limit, Loader, Plain

__all__ = ["VLLM_LOADER"]

_ANY = (MODELOPT, COMPRESSED_TENSORS, FP8)

VLLM_LOADER = Loader(
    VLLM,
    "0.33.0",
    is_run=True,
    knows_all=True,
    plain=(
        *PLAIN_EVERYWHERE,
        Plain((*PLAIN_ROUTERS, "axk1", "jamba"), ROUTER),
        # MambaMixer is built without the configuration
        Plain(("jamba",), r"\.mamba\."),
    ),
    limits=(
        Limit("it drops e_score_correction_bias of the router", ("laguna",), is_garbage=True),
        Limit(
            "it builds the output head quantized, whatever the list says",
            ("afmoe", "exaone_moe"),
            (MODELOPT,),
        ),
        Limit(
            "it builds linear layers of Mamba quantized, whatever the list says",
            ("granitemoehybrid",),
            _ANY,
            kept=r"\.mamba\.",
        ),
        Limit(
            "it has no place for the activation scales of experts",
            ("granitemoehybrid",),
            (COMPRESSED_TENSORS,),
            ("nvfp4",),
        ),
        Limit(
            "it takes rows of block scales of q_proj and k_proj for rows of weights",
            ("llama4", "llama4_text"),
            (COMPRESSED_TENSORS,),
            ("fp8-block",),
            r"\.self_attn\.[qk]_proj$",
        ),
    ),
    converts=(("U8", "F8_E8M0"),),
)
