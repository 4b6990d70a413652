"""DeepSeek's dialect, ``quant_method: fp8``: what most runtimes read of block scales.

    format      role         tensor
    fp8-block   qweight      weight            e4m3
                block_scale  weight_scale_inv  float32, one for 128x128 weights

Despite its name ``weight_scale_inv`` is what weights are multiplied by.

The list of what is not quantized is called ``modules_to_not_convert``, the name that all runtimes
read; it has every module by its full name, for vLLM knows no patterns. It has the output head,
too: transformers quantizes it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formats import UNQUANTIZED
from ...runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..config import with_quantization
from ..dialect import Assignment, Dialect, Spelling
from ..matching import built_of, check
from .match import fp8_readers

__all__ = ["DIALECT"]

_FORMAT = "fp8-block"
_ALL = (VLLM, SGLANG, TRTLLM, TRANSFORMERS)


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json."""
    modules = built_of(assignment)
    entries = sorted({name for m in modules if m.format is None for name in m.linears})
    check(fp8_readers(entries, _FORMAT), modules, "list of modules_to_not_convert")
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": entries,
    }
    return {"config.json": with_quantization(config, quantization)}


_NO_MATCH = "this dialect has 128x128 blocks only"

DIALECT = Dialect(
    name="fp8",
    summary="DeepSeek's files with 128x128 blocks, which every runtime reads",
    spellings={
        _FORMAT: Spelling({"qweight": "weight", "block_scale": "weight_scale_inv"}, _ALL),
        UNQUANTIZED: Spelling({"qweight": "weight"}, _ALL),
    },
    config_files=config_files,
    refused=dict.fromkeys(("fp8-channel", "fp8-tensor", "mxfp8"), _NO_MATCH),
)
