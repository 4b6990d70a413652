"""Names for the ways in which others pack quantized weights, told from tensor names and dtypes."""

from __future__ import annotations

from collections.abc import Mapping

from ..dialects.dialect import COMPRESSED_TENSORS, FP8, MODELOPT
from ..dialects.fp8.table import DEEPSEEK_FP4
from ..dialects.methods import METHODS

__all__ = ["name_of_packing"]


def _what(method: str, format_name: str) -> str:
    """What weights are called that a known method has."""
    spelling = METHODS[method].spelling_of(format_name)
    assert spelling is not None
    return spelling.what


# Endings of tensor names, the dtype of the weight beside them or "", and what writes that.
# The first line that fits counts.
_PACKINGS: tuple[tuple[str, str, str], ...] = (
    ("_blocks", "U8", _what("mxfp4", "mxfp4")),
    (".absmax", "", "bitsandbytes"),
    (".quant_map", "", "bitsandbytes"),
    (".SCB", "", "bitsandbytes"),
    (".g_idx", "", "GPTQ"),
    (".qzeros", "", "AWQ or GPTQ"),
    (".qweight", "I32", "AWQ or GPTQ"),
    (".weight_global_scale", "", _what(COMPRESSED_TENSORS, "nvfp4")),
    (".weight_shape", "", "integers of compressed-tensors"),
    (".weight_packed", "", COMPRESSED_TENSORS),
    ("_scale_2", "", _what(MODELOPT, "nvfp4")),
    (".scale2", "", "NVFP4 of Inkling"),
    ("_scale_inv", "", _what(FP8, "fp8-block")),
    (".scales", "U32", "MLX"),
    (".scale", "I8", DEEPSEEK_FP4.what),
    ("_scale", "F8_E4M3", "FP8"),
    ("", "F8_E4M3", "FP8"),
    ("", "F8_E5M2", "FP8"),
    ("", "U32", "MLX"),
)


def name_of_packing(dtypes: Mapping[str, str]) -> str:
    """What packed these tensors, given with their dtypes; '' if nothing known did.

    >>> name_of_packing({"experts.0.w1.weight": "F8_E4M3", "experts.0.w1.weight_scale_inv": "F32"})
    'FP8 in blocks'
    >>> name_of_packing({"experts.0.w1.weight": "BF16"})
    ''
    """
    found = set(dtypes.values())
    for ending, dtype, name in _PACKINGS:
        if (not dtype or dtype in found) and any(key.endswith(ending) for key in dtypes):
            return name
    return ""
