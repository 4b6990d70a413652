"""The dialect of llm-compressor and the compressed-tensors library.

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

One group of modules for each format. Of a single format the target is the class ``Linear``, which
all runtimes read; of several, expressions: SGLang would look at the class before the members of
fused modules, and TensorRT-LLM refuses classes then.

The format at the top is ``mixed-precision`` for several, as the library has it, and what counts
is that of the group. Experts in 4-bit integers are the exception: SGLang refuses them unless
``pack-quantized`` is at the top (compressed_tensors_wNa16_moe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formats import UNQUANTIZED
from ...runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..config import with_quantization
from ..dialect import Assignment, Dialect, Spelling
from ..matching import built_of, check
from .match import compressed_readers
from .patterns import ignore_list, targets_of

__all__ = ["DIALECT"]


def _number(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    number = {"num_bits": bits, "type": kind, "strategy": strategy}
    return number | {"symmetric": True, "dynamic": False} | more


def _weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return _number(bits, kind, strategy, **more, observer="minmax")


_E4M3 = {"scale_dtype": "torch.float8_e4m3fn"}
_E8M0 = {"group_size": 32, "scale_dtype": "torch.uint8"}  # vLLM knows MX by this type
_NVFP4_WEIGHTS = _weights(4, "float", "tensor_group", group_size=16, **_E4M3)
_NVFP4_INPUT = _number(4, "float", "tensor_group", group_size=16, **_E4M3, dynamic="local")
_TOKEN_FP8 = _number(8, "float", "token", dynamic=True)
_BLOCK_INPUT = _number(8, "float", "group", group_size=128, dynamic=True)
_BLOCK_WEIGHTS = _weights(8, "float", "block", block_structure=[128, 128])
_KV_CACHE = _number(8, "float", "tensor")

# format -> (format of the group, weights, activations)
_SCHEMES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "nvfp4": ("nvfp4-pack-quantized", _NVFP4_WEIGHTS, _NVFP4_INPUT),
    "nvfp4-w4a16": ("nvfp4-pack-quantized", _NVFP4_WEIGHTS, None),
    "mxfp4": (
        "mxfp4-pack-quantized",
        _weights(4, "float", "group", **_E8M0),
        _number(4, "float", "group", **_E8M0, dynamic=True),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        _weights(8, "float", "group", **_E8M0),
        _number(8, "float", "group", **_E8M0, dynamic=True),
    ),
    "fp8-tensor": (
        "float-quantized",
        _weights(8, "float", "tensor"),
        _number(8, "float", "tensor"),
    ),
    "fp8-channel": ("float-quantized", _weights(8, "float", "channel"), _TOKEN_FP8),
    "fp8-block": ("float-quantized", _BLOCK_WEIGHTS, _BLOCK_INPUT),
    "int8-channel": (
        "int-quantized",
        _weights(8, "int", "channel"),
        _number(8, "int", "token", dynamic=True),
    ),
    **{
        f"int4-g{size}": ("pack-quantized", _weights(4, "int", "group", group_size=size), None)
        for size in (128, 64, 32)
    },
}


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json."""
    modules = built_of(assignment)
    groups = targets_of(modules)
    ignore = ignore_list(modules, assignment.set_aside)
    targets = {target: name for name, found in groups.items() for target in found}
    check(compressed_readers(ignore, targets), modules, "list of names and expressions")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": _format_of_all(groups, assignment),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": _KV_CACHE if assignment.kv_cache else None,
        "ignore": ignore,
        "config_groups": {
            f"group_{number}": _group(name, found)
            for number, (name, found) in enumerate(groups.items())
        },
    }
    return {"config.json": with_quantization(config, quantization)}


def _format_of_all(groups: Mapping[str, list[str]], assignment: Assignment) -> str:
    formats = {_SCHEMES[name][0] for name in groups}
    if len(formats) == 1:
        return formats.pop()
    if any(name.startswith("int4") for name in assignment.experts):
        return "pack-quantized"
    return "mixed-precision"


def _group(format_name: str, targets: list[str]) -> dict[str, Any]:
    stored, weights, activations = _SCHEMES[format_name]
    return {
        "targets": targets,
        "format": stored,
        "output_activations": None,
        "weights": weights,
        "input_activations": activations,
    }


_NVFP4 = {
    "qweight": "weight_packed",
    "block_scale": "weight_scale",
    "global_scale": "weight_global_scale",
}
_PACKED = {"qweight": "weight_packed", "block_scale": "weight_scale"}
_BLOCKS = {"qweight": "weight", "block_scale": "weight_scale"}
_CHANNEL = {"qweight": "weight", "channel_scale": "weight_scale"}
_TENSOR = {"qweight": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"}
_RECIPROCALS = frozenset({"global_scale", "input_scale"})
_INT4_RUNTIMES = (VLLM, SGLANG, TRANSFORMERS)

DIALECT = Dialect(
    name="compressed-tensors",
    summary="llm-compressor's files, which have every format",
    spellings={
        "nvfp4": Spelling(
            _NVFP4 | {"input_scale": "input_global_scale"},
            (VLLM, SGLANG, TRTLLM),
            inverse=_RECIPROCALS,
        ),
        "nvfp4-w4a16": Spelling(_NVFP4, (VLLM, SGLANG), inverse=frozenset({"global_scale"})),
        "mxfp4": Spelling(_PACKED, (VLLM, TRANSFORMERS)),
        "mxfp8": Spelling(_BLOCKS, (VLLM,)),
        "fp8-tensor": Spelling(_TENSOR, (VLLM, SGLANG, TRANSFORMERS)),
        "fp8-channel": Spelling(_CHANNEL, (VLLM, SGLANG, TRTLLM, TRANSFORMERS)),
        "fp8-block": Spelling(_BLOCKS, (VLLM, SGLANG, TRTLLM)),
        "int8-channel": Spelling(_CHANNEL, (VLLM,)),
        **{
            f"int4-g{size}": Spelling(_PACKED, _INT4_RUNTIMES, shape_suffix="weight_shape")
            for size in (128, 64, 32)
        },
        UNQUANTIZED: Spelling({"qweight": "weight"}, (VLLM, SGLANG, TRTLLM, TRANSFORMERS)),
    },
    config_files=config_files,
    scalar_shape=(1,),
    mixes=True,
    kv_scales=("k_scale", "v_scale"),
)
