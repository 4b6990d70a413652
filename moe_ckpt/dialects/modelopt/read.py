"""Read what ModelOpt says of quantization, in config.json or hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import show, show_some
from ..matching import Reader, Rule
from ..reading import Reading, first_of, groups_of, require_scale, texts_of
from .match import RUNTIMES, mixed_readers

__all__ = ["read_modelopt"]

# ModelOpt's algorithms, in capitals as vLLM compares them.
_ALGOS = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4-w4a16",
    "FP8": "fp8-tensor",
    "MXFP8": "mxfp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel",
    "FP8_PB_WO": "fp8-block",
    "FP8_BLOCK_SCALES": "fp8-block",
    "MXFP4": "mxfp4",
}


def read_modelopt(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what is said to a reading."""
    key, listed = first_of(said, "ignore", "exclude_modules")
    entries = reading.entries = texts_of(listed, key, reading)
    algo = str(said.get("quant_algo", "")).upper()
    groups = groups_of(said, reading)
    if algo == "MIXED_PRECISION":
        _modelopt_mix(said, groups, reading)
        return
    found = _format_of_algo(algo)
    if found is None:
        reading.problems.append(
            f"quant_algo {show(said.get('quant_algo'))!r} is unknown; known are "
            f"{', '.join(_ALGOS)}, MIXED_PRECISION"
        )
        return
    if found == "nvfp4" and groups and not any(g.get("input_activations") for g in groups.values()):
        found = "nvfp4-w4a16"  # as vLLM takes it
    require_scale(found, reading)
    for name, group in groups.items():
        _check_group(name, group, found, reading)
    size = {"nvfp4": 16, "nvfp4-w4a16": 16, "mxfp8": 32}.get(found)
    stated = said.get("group_size")
    if stated is not None and stated != size:
        reading.problems.append(
            f"group_size is {show(stated)}; {found} has "
            + (f"a scale for {size} weights" if size else "no groups")
        )
    for runtime, rule_of in RUNTIMES.items():
        reading.readers[runtime] = _unless(rule_of(entries), found)


def _unless(excluded: Rule, found: str) -> Reader:
    return lambda module: None if excluded(module.name, module.linears) else found


def _modelopt_mix(
    said: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], reading: Reading
) -> None:
    table = said.get("quantized_layers")
    if not isinstance(table, dict) or not table:
        reading.problems.append(
            'quant_algo MIXED_PRECISION needs "quantized_layers", module -> quant_algo'
        )
        return
    unknown = []
    for name, layer in table.items():
        algo = layer.get("quant_algo") if isinstance(layer, dict) else layer
        found = _format_of_algo(algo)
        if found is None:
            unknown.append(f"{name} {algo}")
            continue
        reading.layers[name] = found
        require_scale(found, reading)
        size = layer.get("group_size") if isinstance(layer, dict) else None
        wanted = {"nvfp4": 16, "nvfp4-w4a16": 16, "mxfp8": 32, "fp8-block": 128}.get(found)
        if size is not None and size != wanted:
            reading.problems.append(f"quantized_layers: {show(name)}: group_size is {show(size)}")
    if unknown:
        reading.problems.append(f"quantized_layers: {show_some(unknown)}: unknown quant_algo")
    for name, group in groups.items():
        named = texts_of(group.get("targets"), f"config_groups.{show(name)}.targets", reading)
        formats = {reading.layers[t] for t in named if t in reading.layers}
        strangers = [t for t in named if t not in reading.layers]
        if strangers:
            reading.problems.append(
                f"config_groups.{show(name)}: {show_some(strangers)}: is not in quantized_layers"
            )
        if len(formats) == 1:
            _check_group(name, group, formats.pop(), reading)
        elif formats:
            reading.problems.append(
                f"config_groups.{show(name)}: its targets are {' and '.join(sorted(formats))} in "
                "quantized_layers"
            )
    reading.readers = mixed_readers(reading.entries, reading.layers)


# format -> bits and group size of weights, and whether activations have a scale that is stored
_GROUPS = {
    "nvfp4": (4, 16, True),
    "nvfp4-w4a16": (4, 16, False),
    "fp8-tensor": (8, None, True),
    "mxfp8": (8, 32, None),
}


def _check_group(name: str, group: Mapping[str, Any], found: str, reading: Reading) -> None:
    """The numbers of a group of ModelOpt's must be those of the algorithm."""
    if found not in _GROUPS:
        return
    bits, size, has_inputs = _GROUPS[found]
    where = f"config_groups.{show(name)}"
    inputs = group.get("input_activations")
    numbers = {"weights": group.get("weights"), "input_activations": inputs}
    for what, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, dict):
            reading.problems.append(f"{where}.{what} must be an object, found {show(number)}")
            continue
        expected = {"num_bits": bits, "group_size": size, "type": "float", "dynamic": False}
        for key, value in expected.items():
            if key in number and number[key] != value:
                reading.problems.append(
                    f"{where}.{what}.{key} is {show(number[key])}; {found} has {value}"
                )
    if has_inputs is not None and (inputs is not None) != has_inputs:
        reading.problems.append(
            f"{where}.input_activations is {'null' if inputs is None else 'there'}; {found} has "
            f"{'4-bit or 8-bit' if has_inputs else '16-bit'} activations"
        )


def _format_of_algo(algo: object) -> str | None:
    """The format that ModelOpt's name of an algorithm stands for."""
    return _ALGOS.get(str(algo).upper())
