"""SGLang's loader."""

from __future__ import annotations

from ..dialects.dialect import COMPRESSED_TENSORS, FP8, MODELOPT
from ..formats import FORMATS
from ..runtimes import SGLANG
from .everywhere import PLAIN_EVERYWHERE, PLAIN_ROUTERS, ROUTER
from .loader import Limit, Loader, Plain

__all__ = ["SGLANG_LOADER"]

_INT4 = tuple(row.name for row in FORMATS if row.module == "int4")
_NVFP4 = ("nvfp4", "nvfp4-w4a16")
# Those whose codes are not in a tensor called weight.
_PACKED = (*_NVFP4, *_INT4)
_ANY = (MODELOPT, COMPRESSED_TENSORS, FP8)
# Multi-head latent attention whose first projections it joins by itself, tensor after tensor.
_Q_A = r"\.self_attn(\.\d+)?\.q_a_proj$"
_MLA = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa", "glm4_moe_lite")
_IN_MIXES = "of several formats, it wants the scales of MXFP8 as weight_scale_inv"

SGLANG_LOADER = Loader(
    SGLANG,
    "0.5.23",
    is_run=True,
    plain=(
        *PLAIN_EVERYWHERE,
        Plain((*PLAIN_ROUTERS, "laguna", "lfm2_moe", "qwen3_moe"), ROUTER),
        Plain(("qwen3_next",), r"\.self_attn\.", (MODELOPT,), _NVFP4),
    ),
    limits=(
        Limit(
            "it keeps the weight scale of q_a_proj for kv_a_proj_with_mqa, too",
            _MLA,
            (MODELOPT,),
            ("fp8-tensor",),
            _Q_A,
            is_garbage=True,
        ),
        Limit(
            "it joins the scales of q_a_proj and kv_a_proj_with_mqa, of which it holds one",
            _MLA,
            (COMPRESSED_TENSORS,),
            (*_PACKED, "fp8-tensor"),
            _Q_A,
        ),
        Limit(
            "it has four places for the one scale of in_proj_qkvz",
            ("qwen3_next",),
            (MODELOPT, COMPRESSED_TENSORS),
            (*_NVFP4, "fp8-tensor"),
            r"\.in_proj_qkvz$",
        ),
        Limit(
            "it looks for the codes of shared experts in a tensor called weight",
            ("qwen3_next", "glm4_moe", "glm4v_moe"),
            (COMPRESSED_TENSORS,),
            _PACKED,
            r"\.shared_experts?\.",
        ),
        Limit(
            "it joins the scales of q_a_proj and kv_a_proj_with_mqa, which have no dimension",
            ("glm4_moe_lite",),
            (MODELOPT,),
            (*_NVFP4, "fp8-tensor"),
            _Q_A,
        ),
        Limit(
            "it builds q_a_proj and kv_a_proj_with_mqa quantized, whatever the list says",
            ("glm4_moe_lite",),
            (FP8,),
            kept=_Q_A,
        ),
        Limit(
            "it builds q_a_proj and kv_a_proj_with_mqa quantized, whatever the list says",
            ("glm4_moe_lite",),
            (MODELOPT,),
            ("mxfp8",),
            kept=_Q_A,
        ),
        Limit(
            "it builds all linear layers quantized, whatever the list says",
            ("hunyuan_v1_moe",),
            _ANY,
            kept=r"_proj$",
        ),
        Limit(
            "it builds the output head quantized, whatever the list says",
            ("hunyuan_v1_moe",),
            (MODELOPT,),
        ),
        Limit(_IN_MIXES, (), (MODELOPT,), ("mxfp8",), in_mixes=True),
        Limit(_IN_MIXES, (), (MODELOPT,), ("mxfp8",), "", in_mixes=True),
        Limit(
            "it builds a Mixtral of several formats with experts in 16 bits",
            ("mixtral",),
            (MODELOPT,),
            in_mixes=True,
        ),
        Limit("it leaves the experts unread", ("afmoe",)),
        Limit("it takes transformers' class, whose layers have other names", ("granitemoehybrid",)),
        Limit(
            "it builds the output head quantized, whatever the list says",
            ("mistral4",),
            (MODELOPT,),
            (*_NVFP4, "fp8-tensor"),
        ),
        Limit(
            "it finds no target for the experts, and stops", ("mistral4",), (COMPRESSED_TENSORS,)
        ),
        Limit("it builds the vision and audio parts quantized, too", ("qwen3_omni_moe",), _ANY),
        Limit(
            "it wants the scales of MXFP8 as weight_scale_inv", ("laguna",), (MODELOPT,), ("mxfp8",)
        ),
        Limit("it builds the vision part quantized, too", ("glm4v_moe",), (FP8,)),
        Limit("it builds the vision part quantized, too", ("glm4v_moe",), (MODELOPT,), ("mxfp8",)),
    ),
    converts=(("U8", "F8_E8M0"),),
)
