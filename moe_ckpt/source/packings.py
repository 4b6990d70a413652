"""Names for the ways in which others pack quantized weights, told from tensor names and dtypes."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["name_of_packing"]

# Endings of tensor names, the dtype of the weight beside them or "", and what writes that.
# The first line that fits counts.
_PACKINGS: tuple[tuple[str, str, str], ...] = (
    ("_blocks", "U8", "MXFP4, as gpt-oss is released"),
    (".absmax", "", "bitsandbytes"),
    (".quant_map", "", "bitsandbytes"),
    (".SCB", "", "bitsandbytes"),
    (".g_idx", "", "GPTQ"),
    (".qzeros", "", "AWQ or GPTQ"),
    (".qweight", "I32", "AWQ or GPTQ"),
    (".weight_global_scale", "", "NVFP4 of compressed-tensors"),
    (".weight_shape", "", "integers of compressed-tensors"),
    (".weight_packed", "", "compressed-tensors"),
    ("_scale_2", "", "NVFP4 of ModelOpt"),
    (".scale2", "", "NVFP4 of Inkling"),
    ("_scale_inv", "", "FP8 in blocks"),
    (".scales", "U32", "MLX"),
    (".scale", "I8", "FP4 of DeepSeek"),
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
