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
"""

from __future__ import annotations

from ...formats import find_format
from ...runtimes import RUNTIMES, SGLANG, TRANSFORMERS, VLLM
from ..dialect import Spelling, plain_spelling

__all__ = ["BLOCKS", "CHANNEL", "DEEPSEEK", "KEPT", "MXFP8", "PLAIN", "SPELLINGS"]

# The list of what is not quantized, by the name that all runtimes read.
KEPT = "modules_to_not_convert"

_ONLY_BLOCKS = "this dialect has 128x128 blocks only"

DEEPSEEK = Spelling(
    "fp8-block",
    "FP8 in blocks",
    {"qweight": "weight", "block_scale": "weight_scale_inv"},
    RUNTIMES,
    scale_dtypes={"block_scale": ("F32", "BF16", "F16", "F8_E8M0")},
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
PLAIN = plain_spelling(RUNTIMES)

# weight_block_size -> the format that it means.
BLOCKS = {
    (part.rows, part.columns): row.format
    for row in SPELLINGS
    for part in find_format(row.format).parts
    if part.role == "block_scale"
}
