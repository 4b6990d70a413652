"""ModelOpt's dialect: what vLLM, SGLang and TensorRT-LLM read as ``quant_method: modelopt``.

    format       role          tensor
    nvfp4*       qweight       weight          uint8, two codes in a byte
                 block_scale   weight_scale    e4m3
                 global_scale  weight_scale_2  float32, 0-d
                 input_scale   input_scale     float32, 0-d
    fp8-tensor   qweight       weight          e4m3
                 global_scale  weight_scale    float32, 0-d
                 input_scale   input_scale     float32, 0-d
    mxfp8        qweight       weight          e4m3
                 block_scale   weight_scale    uint8, powers of two

Experts of a layer in one tensor, as ModelOpt exports Llama 4 and gpt-oss, spell it
``experts.gate_up_proj`` and ``experts.gate_up_proj_weight_scale``: without ``weight``, and with an
underscore. Their tensors are [E, K, N], as the model stores them.

vLLM and SGLang take the configuration from config.json, TensorRT-LLM from
hf_quant_config.json: both are made from one value, so they cannot disagree.

Several formats are ``MIXED_PRECISION`` with the algorithm of each module. Of experts, the name
of the layer's module is enough: vLLM and SGLang look it up first, TensorRT-LLM looks for a key
that holds it. Fused modules are listed by their own name and by their members': SGLang knows the
members only of models that say which they are. What is not quantized is listed as well: vLLM
would take the format of shared experts for routed ones that are not on the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...formats import UNQUANTIZED, find_format
from ...runtimes import SGLANG, TRTLLM, VLLM
from ..config import as_text, with_quantization
from ..dialect import Assignment, Dialect, Spelling
from ..matching import Built, built_of, check, formats_of
from .exclude import exclude_list
from .match import mixed_readers

__all__ = ["DIALECT"]

# Consumers look for the producer "modelopt"; the version is the one whose files these equal.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

_NVFP4 = {
    "qweight": "weight",
    "block_scale": "weight_scale",
    "global_scale": "weight_scale_2",
    "input_scale": "input_scale",
}
_FP8 = {"qweight": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"}
_ALL = (VLLM, SGLANG, TRTLLM)

_NVFP4_NUMBER = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_FP8_NUMBER = {"dynamic": False, "num_bits": 8, "type": "float"}
_MXFP8_NUMBER = _FP8_NUMBER | {"group_size": 32}
_KV_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}

# format -> (quant_algo, activations or None, weights)
_ALGOS: Mapping[str, tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]] = {
    "nvfp4": ("NVFP4", _NVFP4_NUMBER, _NVFP4_NUMBER),
    "nvfp4-w4a16": ("W4A16_NVFP4", None, _NVFP4_NUMBER),
    "fp8-tensor": ("FP8", _FP8_NUMBER, _FP8_NUMBER),
    "mxfp8": ("MXFP8", _MXFP8_NUMBER, _MXFP8_NUMBER),
}


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json and hf_quant_config.json."""
    formats = formats_of(assignment)
    modules = built_of(assignment)
    quantized = [name for m in modules if m.format for name in m.linears]
    kept = [*assignment.kept, *_of_format(assignment, UNQUANTIZED)]
    exclude = exclude_list(quantized, kept, assignment.set_aside)
    if len(formats) == 1:
        return files_of_one(config, formats[0], exclude, assignment.kv_cache)
    return _files_of_mix(config, modules, exclude, assignment.kv_cache)


def _of_format(assignment: Assignment, name: str) -> list[str]:
    experts = [layer.module for layer in assignment.experts.get(name, ())]
    return [*experts, *assignment.linears.get(name, ())]


def files_of_one(
    config: Mapping[str, Any], format_name: str, exclude: Sequence[str], kv_cache: bool = False
) -> dict[str, str]:
    """The files for one format; ``exclude`` are the modules that are not quantized."""
    algo, _, weights = _ALGOS[format_name]
    # ModelOpt writes no groups for this algorithm.
    groups = {} if algo == "MXFP8" else {"config_groups": {"group_0": _group(format_name)}}
    groups = {
        key: {k: v | {"targets": ["Linear"]} for k, v in g.items()} for key, g in groups.items()
    }
    size = {"group_size": weights["group_size"]} if "group_size" in weights else {}
    return _files(config, algo, groups, size, exclude, kv_cache)


def _files_of_mix(
    config: Mapping[str, Any], modules: Sequence[Built], exclude: Sequence[str], kv_cache: bool
) -> dict[str, str]:
    layers = {
        name: module.format
        for module in modules
        if module.format
        for name in ([module.name] if module.is_experts else module.names)
    }
    check(mixed_readers(exclude, layers), modules, "table of quantized layers")
    groups = {
        f"group_{number}": _group(format_name)
        | {"targets": sorted(name for name, found in layers.items() if found == format_name)}
        for number, format_name in enumerate(dict.fromkeys(layers.values()))
    }
    table = {name: _layer(format_name) for name, format_name in layers.items()}
    quantized = {"quantized_layers": table}
    return _files(
        config,
        "MIXED_PRECISION",
        {"config_groups": groups} | quantized,
        quantized,
        exclude,
        kv_cache,
    )


def _group(format_name: str) -> dict[str, Any]:
    _, activations, weights = _ALGOS[format_name]
    given = {} if activations is None else {"input_activations": activations}
    return given | {"weights": weights}


def _layer(format_name: str) -> dict[str, Any]:
    algo, _, weights = _ALGOS[format_name]
    return {"quant_algo": algo} | {key: weights[key] for key in weights if key == "group_size"}


def _files(
    config: Mapping[str, Any],
    algo: str,
    flat: Mapping[str, Any],
    nested: Mapping[str, Any],
    exclude: Sequence[str],
    kv_cache: bool,
) -> dict[str, str]:
    """Both files; ``flat`` and ``nested`` are what only one of them has, before its list."""
    quantization_config = {
        **flat,
        "ignore": list(exclude),
        "quant_algo": algo,
        **({"kv_cache_scheme": _KV_CACHE} if kv_cache else {}),
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }
    quantization = {
        "quant_algo": algo,
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        **nested,
        "exclude_modules": list(exclude),
    }
    return {
        "hf_quant_config.json": as_text({"producer": _PRODUCER, "quantization": quantization}),
        "config.json": with_quantization(config, quantization_config),
    }


def refused_mix(formats: Sequence[str]) -> str:
    """SGLang sends a mix without NVFP4 to another method (model_config.py, MIXED_PRECISION)."""
    if any(find_format(name).weights == "nvfp4" for name in formats):
        return ""
    return "SGLang takes a ModelOpt mix without NVFP4 for 4-bit integers"


_NO_MOE = "vLLM and SGLang read no experts of ModelOpt's with {}"
_UNKNOWN = "vLLM and SGLang know no such algorithm of ModelOpt's"

DIALECT = Dialect(
    name="modelopt",
    summary="NVIDIA ModelOpt's export for vLLM, SGLang and TensorRT-LLM",
    spellings={
        "nvfp4": Spelling(_NVFP4, _ALL),
        "nvfp4-w4a16": Spelling(
            {role: suffix for role, suffix in _NVFP4.items() if role != "input_scale"}, (VLLM,)
        ),
        "fp8-tensor": Spelling(_FP8, _ALL),
        # SGLang wants the scales as weight_scale_inv (fp8.py, use_mxfp8).
        "mxfp8": Spelling({"qweight": "weight", "block_scale": "weight_scale"}, (VLLM, TRTLLM)),
        UNQUANTIZED: Spelling({"qweight": "weight"}, _ALL),
    },
    config_files=config_files,
    refused={
        "fp8-block": _NO_MOE.format("a scale for each block"),
        "fp8-channel": _NO_MOE.format("a scale for each row"),
        "mxfp4": _UNKNOWN,
        **dict.fromkeys(("int4-g128", "int4-g64", "int4-g32", "int8-channel"), _UNKNOWN),
    },
    stacks=True,
    mixes=True,
    refused_mix=refused_mix,
    kv_scales=("k_proj.k_scale", "v_proj.v_scale"),
)
