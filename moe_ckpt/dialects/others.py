"""The ``quant_method``s that no dialect here writes: what they hold, and how they are read.

`UNREAD_METHODS` are those that runtimes know and nothing here reads.

    method      format       tensors
    fbgemm_fp8  fp8-channel  as in `fp8`
    mxfp8       mxfp8        as in `fp8`
    mxfp4       mxfp4        NAME_blocks, uint8 [E, N, K/32, 16], two codes in a byte, and
                             NAME_scales, uint8 [E, N, K/32], powers of two

The last is gpt-oss as it is released; NAME is the experts' gate_up_proj or down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtimes import RUNTIMES
from .dialect import Spelling
from .fp8.read import read_lists
from .fp8.table import CHANNEL, KEPT, MXFP8
from .matching import Built
from .reading import Reading, texts_of

__all__ = ["GPT_OSS", "OWN_TENSORS", "UNREAD_METHODS"]
__all__ += ["read_fbgemm", "read_mxfp4", "read_mxfp8"]

# Those of vLLM, SGLang (layers/quantization/__init__.py of each) and transformers
# (quantizers/auto.py) whose tensors have names of their own ...
OWN_TENSORS = frozenset(
    "aqlm auto_awq auto_gptq awq awq_marlin bitblas bitnet bitsandbytes eetq gguf gptq "
    "gptq_marlin higgs hqq moe_wna16 qoq quanto rtn sinq spqr vptq".split()
)
# ... and those that may look like what is read here.
UNREAD_METHODS = OWN_TENSORS.union(
    "auto-round auto_round blockwise_int8 deepseek_v4_fp8 deepspeedfp experts_int8 fouroversix "
    "fp_quant gpt_oss_mxfp4 humming inc intel metal minimax_m3_nvfp4 mlx_q4 mlx_q8 modelslim "
    "mxfp_w4a8 nvfp4 petit_nvfp4 ptpc_fp8 quark quark_int4fp8_moe quark_mxfp4 torchao tpu_int8 "
    "w4afp8 w8a8_fp8 w8a8_int8".split()
)

GPT_OSS = Spelling(
    "mxfp4",
    "MXFP4, as gpt-oss is released",
    {"qweight": "blocks", "block_scale": "scales"},
    RUNTIMES,
)


def read_fbgemm(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``fbgemm_fp8`` says to a reading."""
    read_lists(said, CHANNEL.format, reading)


def read_mxfp8(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``mxfp8`` says to a reading."""
    read_lists(said, MXFP8.format, reading)


def read_mxfp4(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what ``mxfp4`` says: all runtimes quantize the experts, and read no list for them."""
    reading.entries = texts_of(said.get(KEPT), KEPT, reading)

    def read(module: Built) -> str | None:
        return GPT_OSS.format if module.is_experts else None

    reading.readers = dict.fromkeys(RUNTIMES, read)
