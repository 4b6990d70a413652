"""What checkpoints of ``quant_method: fp8`` hold: DeepSeek's blocks, and what others put there.

    format       role          tensor
    fp8-block    qweight       weight            e4m3
                 block_scale   weight_scale_inv  float32, one for 128x128 weights
    fp8-channel  qweight       weight            e4m3
                 channel_scale weight_scale      a float for each row
    fp8-tensor   qweight       weight            e4m3
                 global_scale  weight_scale      a float
                 input_scale   input_scale       a float, if activation_scheme is static
    mxfp8        qweight       weight            e4m3
                 block_scale   weight_scale_inv  uint8, powers of two

Despite its name ``weight_scale_inv`` is what weights are multiplied by.

The same formats are found under other names, and are not written so:

    fp8-tensor   global_scale  weight_scale_inv  a float, as transformers stores it, with
                 input_scale   activation_scale  a float
                 global_scale  qscale_weight     a float, as Mistral stores it, with
                 input_scale   qscale_act        a float
    fp8-block    block_scale   scale             E8M0, one for 128x128 weights, of DeepSeek-V4
    mxfp4        qweight       weight            two codes in a byte, uint8 or int8
                 block_scale   scale             E8M0, experts of DeepSeek-V4
                 block_scale   weight_scale_inv  E8M0, experts of others

With ``mxfp4`` the experts are of another format than everything else: ``expert_dtype: fp4`` says so
to transformers and to DeepSeek-V4 in vLLM, ``routed_experts_quant_method`` or ``store_dtype`` to
others in vLLM.
"""

from __future__ import annotations

from ...formats import find_format
from ...runtimes import RUNTIMES, SGLANG, TRANSFORMERS, VLLM
from ..dialect import Spelling, plain_spelling

__all__ = [
    "BLOCKS",
    "CARRIED",
    "CHANNEL",
    "DEEPSEEK",
    "DEEPSEEK_FP4",
    "KEPT",
    "MXFP8",
    "OTHER_SPELLINGS",
]
__all__ += ["PLAIN", "SPELLINGS"]

# The list of what is not quantized, by the name that all runtimes read.
KEPT = "modules_to_not_convert"

# What runtimes act on besides, and is true of the same weights only.
CARRIED = ("scale_fmt",)

_ONLY_BLOCKS = "this dialect has 128x128 blocks only"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")

_WITH_FP4 = (VLLM, SGLANG, TRANSFORMERS)

DEEPSEEK = Spelling(
    "fp8-block",
    "FP8 in blocks",
    {"qweight": "weight", "block_scale": "weight_scale_inv"},
    RUNTIMES,
    scale_dtypes={"block_scale": _SCALES},
    kept_dtypes={"block_scale": ("F8_E8M0",)},
)
CHANNEL = Spelling(
    "fp8-channel",
    "FP8 per channel",
    {"qweight": "weight", "channel_scale": "weight_scale"},
    (),
    not_written=_ONLY_BLOCKS,
)
_TENSOR = Spelling(
    "fp8-tensor",
    "FP8 per tensor",
    {"qweight": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"},
    (VLLM, SGLANG),
    not_written=_ONLY_BLOCKS,
)
MXFP8 = Spelling(
    "mxfp8",
    "MXFP8",
    {"qweight": "weight", "block_scale": "weight_scale_inv"},
    (SGLANG, TRANSFORMERS),
    why_not={VLLM: "it wants the scales as weight_scale"},
    not_written=_ONLY_BLOCKS,
)
SPELLINGS = (DEEPSEEK, CHANNEL, _TENSOR, MXFP8)

DEEPSEEK_FP4 = Spelling(
    "mxfp4",
    "FP4 of DeepSeek",
    {"qweight": "weight", "block_scale": "scale"},
    _WITH_FP4,
    not_written=_ONLY_BLOCKS,
    scale_dtypes={"block_scale": ("F8_E8M0", "U8")},
    code_dtypes=("I8",),
)
OTHER_SPELLINGS = (
    DEEPSEEK_FP4,
    Spelling(
        "mxfp4",
        "MXFP4 beside FP8",
        {"qweight": "weight", "block_scale": "weight_scale_inv"},
        _WITH_FP4,
        not_written=_ONLY_BLOCKS,
        code_dtypes=("I8",),
    ),
    Spelling(
        "fp8-block",
        "FP8 in blocks of DeepSeek-V4",
        {"qweight": "weight", "block_scale": "scale"},
        _WITH_FP4,
        not_written=_ONLY_BLOCKS,
        scale_dtypes={"block_scale": _SCALES},
    ),
    Spelling(
        "fp8-tensor",
        "FP8 per tensor of transformers",
        {
            "qweight": "weight",
            "global_scale": "weight_scale_inv",
            "input_scale": "activation_scale",
        },
        (TRANSFORMERS,),
        not_written=_ONLY_BLOCKS,
    ),
    Spelling(
        "fp8-tensor",
        "FP8 per tensor of Mistral",
        {"qweight": "weight", "global_scale": "qscale_weight", "input_scale": "qscale_act"},
        (VLLM,),
        not_written=_ONLY_BLOCKS,
    ),
)
PLAIN = plain_spelling(RUNTIMES)

# weight_block_size -> the format that it means.
BLOCKS = {
    (part.rows, part.columns): row.format
    for row in SPELLINGS
    for part in find_format(row.format).parts
    if part.role == "block_scale"
}
