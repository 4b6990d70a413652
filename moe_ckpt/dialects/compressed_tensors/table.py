"""The schemes of compressed-tensors: how each format is described, and which tensors it makes.

    format         role          tensor
    nvfp4*         qweight       weight_packed        uint8, two codes in a byte
                   block_scale   weight_scale         e4m3
                   global_scale  weight_global_scale  float32 [1], the reciprocal
                   input_scale   input_global_scale   float32 [1], the reciprocal
    mxfp4          qweight       weight_packed        uint8, two codes in a byte
                   block_scale   weight_scale         uint8, powers of two
    int4-*         qweight       weight_packed        int32, eight codes in a word
                   block_scale   weight_scale         bf16
                   (its N, K)    weight_shape         int64 [2]
    fp8-*, mxfp8,  qweight       weight               e4m3 or int8
    int8-channel   its scale     weight_scale         [1], [N, 1], or [N/128, K/128]
    fp8-tensor     input_scale   input_scale          float32 [1]

What a group says of its weights follows from the format: kind and bits from its codes, and the
strategy from the block of its finest scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...formats import WHOLE_ROW, QuantFormat, find_format
from ...runtimes import RUNTIMES, SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..dialect import Spelling, plain_spelling

__all__ = ["KV_CACHE", "PACKED", "PLAIN", "SCHEMES", "SPELLINGS", "Scheme", "scheme_of"]

PACKED = "pack-quantized"

# What is said of a scale besides its group; vLLM tells MX formats by torch.uint8.
_SCALE_DTYPES = {"F8_E4M3": "torch.float8_e4m3fn", "U8": "torch.uint8"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How compressed-tensors describes matrices of one format.

    ``stored``: the format of their group, by which the library picks a compressor.
    ``inputs``: what the group says of activations; None if they stay in 16 bits.
    ``also``: what else runtimes know of activations beside such weights, by its key.
    """

    spelling: Spelling
    stored: str
    inputs: Mapping[str, Any] | None = None
    also: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Any]:
        """What the group says of the weights."""
        return _of_format(self.spelling.format) | {"observer": "minmax"}


def _number(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    number = {"num_bits": bits, "type": kind, "strategy": strategy}
    return number | {"symmetric": True, "dynamic": False} | more


def _of_format(name: str, **more: Any) -> dict[str, Any]:
    """The numbers that a format is made of."""
    row = find_format(name)
    kind = "int" if row.codes and row.codes.is_integer else "float"
    strategy, block = _strategy(row)
    return _number(row.weight_bits, kind, strategy, **block, **more)


def _strategy(row: QuantFormat) -> tuple[str, dict[str, Any]]:
    """Which weights share the finest scale of a format, and how large their blocks are."""
    scale = row.scale
    assert scale is not None
    if scale.is_scalar:
        return "tensor", {}
    if scale.columns == WHOLE_ROW:
        return "channel", {}
    if scale.rows > 1:
        return "block", {"block_structure": [scale.rows, scale.columns]}
    block: dict[str, Any] = {"group_size": scale.columns}
    if scale.dtype in _SCALE_DTYPES:
        block["scale_dtype"] = _SCALE_DTYPES[scale.dtype]
    has_global = any(part.role == "global_scale" for part in row.parts)
    return ("tensor_group" if has_global else "group"), block


KV_CACHE = _number(8, "float", "tensor")

_NVFP4 = {
    "qweight": "weight_packed",
    "block_scale": "weight_scale",
    "global_scale": "weight_global_scale",
}
_PACKED = {"qweight": "weight_packed", "block_scale": "weight_scale"}
_BLOCKS = {"qweight": "weight", "block_scale": "weight_scale"}
_CHANNEL = {"qweight": "weight", "channel_scale": "weight_scale"}
_TENSOR = {"qweight": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"}
_DROPS_SCALES = {TRANSFORMERS: "it drops the global scales of experts"}


def _int4(group: int) -> Scheme:
    return Scheme(
        Spelling(
            f"int4-g{group}",
            f"int4 of compressed-tensors, groups of {group}",
            _PACKED,
            (VLLM, SGLANG, TRANSFORMERS),
            shape_suffix="weight_shape",
        ),
        PACKED,
    )


SCHEMES = (
    Scheme(
        Spelling(
            "nvfp4",
            "NVFP4 of compressed-tensors",
            _NVFP4 | {"input_scale": "input_global_scale"},
            (VLLM, SGLANG, TRTLLM),
            why_not=_DROPS_SCALES,
            inverse=frozenset({"global_scale", "input_scale"}),
            scale_dtypes={"global_scale": ("F32",)},
        ),
        "nvfp4-pack-quantized",
        _of_format("nvfp4", dynamic="local"),
        also={"dynamic": (False,)},
    ),
    Scheme(
        Spelling(
            "nvfp4-w4a16",
            "NVFP4 of compressed-tensors",
            _NVFP4,
            (VLLM, SGLANG),
            why_not=_DROPS_SCALES,
            inverse=frozenset({"global_scale"}),
            scale_dtypes={"global_scale": ("F32",)},
        ),
        "nvfp4-pack-quantized",
    ),
    Scheme(
        Spelling("mxfp4", "MXFP4 of compressed-tensors", _PACKED, (VLLM, TRANSFORMERS)),
        "mxfp4-pack-quantized",
        _of_format("mxfp4", dynamic=True),
    ),
    Scheme(
        Spelling("mxfp8", "MXFP8", _BLOCKS, (VLLM,)),
        "mxfp8-quantized",
        _of_format("mxfp8", dynamic=True),
    ),
    Scheme(
        Spelling("fp8-tensor", "FP8 per tensor", _TENSOR, (VLLM, SGLANG, TRANSFORMERS)),
        "float-quantized",
        _of_format("fp8-tensor"),
        also={"strategy": ("token",), "dynamic": (True,)},
    ),
    Scheme(
        Spelling("fp8-channel", "FP8 per channel", _CHANNEL, RUNTIMES),
        "float-quantized",
        _number(8, "float", "token", dynamic=True),
    ),
    Scheme(
        Spelling(
            "fp8-block",
            "FP8 in blocks",
            _BLOCKS,
            (VLLM, SGLANG, TRTLLM),
            why_not={TRANSFORMERS: "it spreads the scales of experts wrongly"},
        ),
        "float-quantized",
        _number(8, "float", "group", group_size=128, dynamic=True),
        also={"strategy": ("token",)},
    ),
    Scheme(
        Spelling("int8-channel", "int8 of compressed-tensors", _CHANNEL, (VLLM,)),
        "int-quantized",
        _number(8, "int", "token", dynamic=True),
    ),
    _int4(128),
    _int4(64),
    _int4(32),
)
SPELLINGS = tuple(scheme.spelling for scheme in SCHEMES)
PLAIN = plain_spelling(RUNTIMES)


def scheme_of(format_name: str) -> Scheme:
    """The scheme of a format."""
    return next(scheme for scheme in SCHEMES if scheme.spelling.format == format_name)
