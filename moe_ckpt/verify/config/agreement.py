"""Whether configuration files agree with each other, and name what can be named."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...dialects.config import CONFIG, HF_QUANT_CONFIG
from ...dialects.dialect import MODELOPT
from ...dialects.modelopt.table import algorithm_named
from ...dialects.reading import Reading
from ...errors import show, show_some
from ...layouts.config_keys import complete_config
from ...planning.kv_cache import JOINED, KV_SCALES, other_scale
from ..findings import WARNING, Findings
from ..inventory import Inventory, expert_of
from ..subject import Subject

__all__ = ["check_keys", "check_kv_cache", "check_single_experts", "check_two_files"]

_JOINED = tuple(f".{place}{ending}" for place in JOINED for ending in KV_SCALES)
_TWO_FILES = (
    "TensorRT-LLM goes by hf_quant_config.json, vLLM and SGLang by config.json: one is wrong"
)


def check_keys(subject: Subject, findings: Findings) -> None:
    """Report keys of config.json that runtimes ask for, and that transformers leaves out."""
    for key in complete_config(subject.config, subject.source.tensors.keys()).missing:
        findings.add(
            "config",
            CONFIG,
            f"lacks {key.name}, and {key.runtimes} for it",
            "runtimes that ask for a key that is not there stop, or take another value than the "
            "model was trained with; take it from the config.json of the release",
            WARNING,
            stops=key.stops,
        )


def check_two_files(subject: Subject, readings: Mapping[str, Reading], findings: Findings) -> None:
    """config.json and hf_quant_config.json must say the same."""
    beside = next((said for said in subject.said if said.where == HF_QUANT_CONFIG), None)
    config = next((said for said in subject.said if said.where != HF_QUANT_CONFIG), None)
    if beside is None or config is None:
        return
    if config.method != MODELOPT:
        findings.add(
            "config",
            HF_QUANT_CONFIG,
            f"is there beside quant_method {show(config.method)!r} in config.json",
            _TWO_FILES,
        )
        return
    one, other = readings[config.where], readings[HF_QUANT_CONFIG]
    algorithm = algorithm_named(beside.said.get("quant_algo"))
    differences = [
        f'has no "{key}", which vLLM wants there'
        for key in (algorithm.keys_beside if algorithm else ())
        if key not in beside.said
    ]
    algos = [str(said.said.get("quant_algo", "")).upper() for said in (config, beside)]
    if algos[0] != algos[1]:
        differences.append(f"quant_algo is {show(algos[1])}, in config.json {show(algos[0])}")
    for name, here, there in (
        ("exclude_modules", other.entries, one.entries),
        ("quantized_layers", tuple(other.layers.items()), tuple(one.layers.items())),
    ):
        more, less = sorted({*here} - {*there}), sorted({*there} - {*here})
        if more:
            differences.append(f"{name} has {show_some(more)}, and config.json has not")
        if less:
            differences.append(f"{name} lacks {show_some(less)}, which config.json has")
    schemes = [said.has_kv_cache for said in (config, beside)]
    if schemes[0] != schemes[1]:
        said = ["an FP8 KV cache" if has else "no FP8 KV cache" for has in schemes]
        differences.append(f"says {said[1]}, and config.json {said[0]}")
    for difference in differences:
        findings.add("config", HF_QUANT_CONFIG, difference, _TWO_FILES)


def check_single_experts(
    inventory: Inventory, readings: Mapping[str, Reading], findings: Findings
) -> None:
    """Report experts that are listed one by one where the layer is quantized."""
    for where, reading in readings.items():
        for entry in reading.entries:
            found = None if entry.startswith("re:") else expert_of(_whole_name(entry))
            experts = inventory.experts.get(found[0]) if found else None
            if experts and any(module.is_quantized for module in experts.matrices):
                findings.add(
                    "config",
                    show(entry),
                    f"is listed as not quantized in {where}, one expert of a layer that is",
                    "vLLM builds all experts of the layer in 16 bits, and stops at their shapes",
                )


def _whole_name(entry: str) -> str:
    """An entry as the name of a matrix: an expert may be named without its projection."""
    entry = entry.rstrip("*").rstrip(".")
    return f"{entry}.x" if re.search(r"experts\.[0-9]+$", entry) else entry


def check_kv_cache(subject: Subject, findings: Findings) -> None:
    """A scheme for the KV cache and its scales go together."""
    tensors = subject.source.tensors
    scales = [name for name in tensors if name.endswith(KV_SCALES)]
    declared = any(said.has_kv_cache for said in subject.said)
    any_scheme = declared or any(said.unknown_kv_cache for said in subject.said)
    if declared and not scales:
        findings.add(
            "config",
            show(subject.said[0].where),
            "says that the KV cache is FP8, and there is no k_scale and v_scale",
            "vLLM warns and takes 1.0: keys and values above 448 are cut off",
        )
    if scales and not any_scheme:
        findings.add(
            "config",
            show(scales[0]),
            f"is one of {len(scales)} scales of a KV cache that no file says is quantized",
            "runtimes keep the cache in 16 bits, and those that know no such name stop",
        )
    for name in scales:
        other = other_scale(name)
        if other not in tensors:
            findings.add(
                "config",
                show(other),
                f"is missing beside {show(name)}",
                "vLLM takes the one for both",
            )
    joined = [name for name in scales if name.endswith(_JOINED)]
    if joined:
        findings.add(
            "config",
            show(joined[0]),
            f"is one of {len(joined)} scales of a KV cache in qkv_proj, where vLLM looks for them "
            "and SGLang does not",
            "SGLang warns and takes 1.0: keys and values above 448 are cut off",
            WARNING,
        )
