"""vLLM's loader."""

from __future__ import annotations

from ..dialects.dialect import COMPRESSED_TENSORS, FP8, MODELOPT
from ..runtimes import VLLM
from .everywhere import PLAIN_EVERYWHERE, ROUTER
from .loader import Limit, Loader, Plain

__all__ = ["VLLM_LOADER"]

_ANY = (MODELOPT, COMPRESSED_TENSORS, FP8)
_PLAIN_ROUTERS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa"),
    "deepseek_v4",
    *("axk1", "cohere2_moe", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "hy_v3", "jamba"),
    *("granitemoe", "granitemoeshared", "granitemoe_swa", "mellum", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_next"),
)

VLLM_LOADER = Loader(
    VLLM,
    "0.33.0",
    is_run=True,
    knows_all=True,
    plain=(
        *PLAIN_EVERYWHERE,
        Plain(_PLAIN_ROUTERS, ROUTER),
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
