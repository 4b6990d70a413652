"""What all runtimes, or both servers, build in 16 bits."""

from __future__ import annotations

from ..dialects.dialect import COMPRESSED_TENSORS, FP8
from .loader import Plain

__all__ = ["PLAIN_EVERYWHERE", "PLAIN_ROUTERS", "ROUTER"]

# The router of a layer, and not the gate of a shared expert.
ROUTER = r"\.gate(\.wg)?$|\.router(\.(gate|layer|proj|classifier))?$"

# The model types of which both vLLM and SGLang build it so, whatever the list says.
PLAIN_ROUTERS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "kimi_k25"),
    *("glm_moe_dsa", "glm4_moe", "glm4_moe_lite", "cohere2_moe", "ernie4_5_moe", "hy_v3"),
    *("granitemoe", "granitemoeshared", "granitemoe_swa", "mellum", "minimax_m2", "mixtral"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_next"),
)

# Of multi-token prediction: a linear layer of torch's, and a head, which these methods leave alone.
PLAIN_EVERYWHERE = (
    Plain((), r"\.eh_proj$"),
    Plain((), r"\.shared_head\.head$", (FP8, COMPRESSED_TENSORS)),
)
