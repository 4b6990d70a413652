"""ModelOpt's dialect: what vLLM, SGLang and TensorRT-LLM read as ``quant_method: modelopt``.

`table` has its tensors and algorithms.

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
from ..config import as_text, with_quantization
from ..dialect import Assignment, Dialect, refused, written
from ..matching import Built, built_of, check, formats_of
from .exclude import exclude_list
from .match import mixed_readers
from .table import MIX, PLAIN, SPELLINGS, UNKNOWN_FORMATS, Algorithm, algorithm_of

__all__ = ["DIALECT"]

# Consumers look for the producer "modelopt"; the version is the one whose files these equal.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

_KV_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


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
    algorithm = algorithm_of(format_name)
    group = _group(algorithm) | {"targets": ["Linear"]}
    groups = {"config_groups": {"group_0": group}} if algorithm.is_grouped else {}
    return _files(config, algorithm.names[0], groups, _size(algorithm), exclude, kv_cache)


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
        f"group_{number}": _group(algorithm_of(format_name))
        | {"targets": sorted(name for name, found in layers.items() if found == format_name)}
        for number, format_name in enumerate(dict.fromkeys(layers.values()))
    }
    table = {name: _layer(algorithm_of(found)) for name, found in layers.items()}
    quantized = {"quantized_layers": table}
    return _files(
        config,
        MIX,
        {"config_groups": groups} | quantized,
        quantized,
        exclude,
        kv_cache,
    )


def _group(algorithm: Algorithm) -> dict[str, Any]:
    given = {"input_activations": algorithm.number} if algorithm.has_inputs else {}
    return given | {"weights": algorithm.number}


def _layer(algorithm: Algorithm) -> dict[str, Any]:
    return {"quant_algo": algorithm.names[0]} | _size(algorithm)


def _size(algorithm: Algorithm) -> dict[str, Any]:
    return {} if algorithm.group_size is None else {"group_size": algorithm.group_size}


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


DIALECT = Dialect(
    name="modelopt",
    summary="NVIDIA ModelOpt's export for vLLM, SGLang and TensorRT-LLM",
    spellings=written([*SPELLINGS, PLAIN]),
    config_files=config_files,
    refused={**refused(SPELLINGS), **UNKNOWN_FORMATS},
    stacks=True,
    mixes=True,
    refused_mix=refused_mix,
    kv_scales=("k_proj.k_scale", "v_proj.v_scale"),
)
