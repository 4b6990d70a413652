"""ModelOpt's dialect: what vLLM, SGLang and TensorRT-LLM read as ``quant_method: modelopt``.

    format       role          tensor
    nvfp4*       qweight       weight          uint8, two codes in a byte
                 block_scale   weight_scale    e4m3
                 global_scale  weight_scale_2  float32, 0-d
                 input_scale   input_scale     float32, 0-d
    fp8-tensor   qweight       weight          e4m3
                 global_scale  weight_scale    float32, 0-d
                 input_scale   input_scale     float32, 0-d

Experts of a layer in one tensor, as ModelOpt exports Llama 4 and gpt-oss, spell it
``experts.gate_up_proj`` and ``experts.gate_up_proj_weight_scale``: without ``weight``, and with an
underscore. Their tensors are [E, K, N], as the model stores them.

vLLM and SGLang take the configuration from config.json, TensorRT-LLM from
hf_quant_config.json: both are made from one value, so they cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LOADERS", "config_files", "tensor_name"]

# Who reads which format of this dialect. transformers has no quantizer for it and would load
# the codes as if they were weights.
LOADERS: Mapping[str, tuple[str, ...]] = {
    "nvfp4": ("vLLM", "SGLang", "TensorRT-LLM"),
    "nvfp4-w4a16": ("vLLM",),
    "fp8-tensor": ("vLLM", "SGLang", "TensorRT-LLM"),
}

# Consumers look for the producer "modelopt"; the version is the one whose files these equal.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

_NVFP4 = {
    "qweight": "weight",
    "block_scale": "weight_scale",
    "global_scale": "weight_scale_2",
    "input_scale": "input_scale",
}
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "nvfp4": _NVFP4,
    "nvfp4-w4a16": _NVFP4,
    "fp8-tensor": {
        "qweight": "weight",
        "global_scale": "weight_scale",
        "input_scale": "input_scale",
    },
}
_NVFP4_NUMBER: Mapping[str, Any] = {
    "dynamic": False,
    "num_bits": 4,
    "type": "float",
    "group_size": 16,
}
_FP8_NUMBER: Mapping[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}

# format -> (quant_algo, activations or None, weights)
_ALGOS: Mapping[str, tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]] = {
    "nvfp4": ("NVFP4", _NVFP4_NUMBER, _NVFP4_NUMBER),
    "nvfp4-w4a16": ("W4A16_NVFP4", None, _NVFP4_NUMBER),
    "fp8-tensor": ("FP8", _FP8_NUMBER, _FP8_NUMBER),
}


def tensor_name(format_name: str, module: str, role: str, is_stacked: bool) -> str:
    """The tensor that holds a part of a module, or of all experts' modules.

    >>> tensor_name("nvfp4", "experts.0.up_proj", "block_scale", False)
    'experts.0.up_proj.weight_scale'
    >>> tensor_name("nvfp4", "experts.down_proj", "qweight", True)
    'experts.down_proj'
    """
    suffix = _SUFFIXES[format_name][role]
    if not is_stacked:
        return f"{module}.{suffix}"
    return module if suffix == "weight" else f"{module}_{suffix}"


def config_files(
    config: Mapping[str, Any], format_name: str, exclude: Sequence[str]
) -> dict[str, str]:
    """The text of config.json and hf_quant_config.json.

    Args:
        config: the source's config; its keys and their order are kept.
        format_name: a key of the table above.
        exclude: modules that are not quantized, as names or patterns.
    """
    algo, activations, weights = _ALGOS[format_name]
    group: dict[str, Any] = {} if activations is None else {"input_activations": activations}
    group |= {"weights": weights, "targets": ["Linear"]}
    quantization_config = {
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "quant_algo": algo,
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }
    quantization: dict[str, Any] = {"quant_algo": algo, "kv_cache_quant_algo": None}
    if "group_size" in weights:
        quantization["group_size"] = weights["group_size"]
    quantization["exclude_modules"] = list(exclude)
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {
        "hf_quant_config.json": _text({"producer": _PRODUCER, "quantization": quantization}),
        "config.json": _text(kept | {"quantization_config": quantization_config}),
    }


def _text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
