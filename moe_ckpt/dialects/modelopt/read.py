"""Read what ModelOpt says of quantization, in config.json or hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import show, show_some
from ...formats import find_format, without_input_scale
from ..matching import Reader, Rule
from ..reading import Reading, first_of, groups_of, require_scale, texts_of
from .match import RULES, mixed_readers
from .table import (
    ALGORITHMS,
    FOREIGN,
    MIX,
    READ_IN_SOURCES,
    algorithm_named,
    algorithm_of,
)

__all__ = ["foreign_algorithms", "read_modelopt", "unread_algorithms"]


def read_modelopt(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what is said to a reading."""
    key, listed = first_of(said, "ignore", "exclude_modules")
    entries = reading.entries = texts_of(listed, key, reading)
    algo = str(said.get("quant_algo", "")).upper()
    groups = groups_of(said, reading)
    if algo == MIX:
        _read_mix(said, groups, reading)
        return
    algorithm = algorithm_named(algo)
    if algorithm is None:
        known = [name for each in ALGORITHMS for name in each.names]
        reading.problems.append(
            f"quant_algo {show(said.get('quant_algo'))!r} is unknown; known are "
            f"{', '.join(known)}, {MIX}"
        )
        return
    found = algorithm.spelling.format
    if groups and not any(group.get("input_activations") for group in groups.values()):
        found = without_input_scale(found)  # as vLLM takes NVFP4
    require_scale(found, reading)
    for name, group in groups.items():
        _check_group(name, group, found, reading)
    size, stated = algorithm.group_size, said.get("group_size")
    if stated is not None and stated != size:
        reading.problems.append(
            f"group_size is {show(stated)}; {found} has "
            + (f"a scale for {size} weights" if size else "no groups")
        )
    for runtime, rule_of in RULES.items():
        reading.readers[runtime] = _unless(rule_of(entries), found)


def _unless(excluded: Rule, found: str) -> Reader:
    return lambda module: None if excluded(module.name, module.linears) else found


def _read_mix(
    said: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], reading: Reading
) -> None:
    table = said.get("quantized_layers")
    if not isinstance(table, dict) or not table:
        reading.problems.append(f'quant_algo {MIX} needs "quantized_layers", module -> quant_algo')
        return
    unknown = []
    for name, layer in table.items():
        algo = layer.get("quant_algo") if isinstance(layer, dict) else layer
        algorithm = algorithm_named(algo)
        if algorithm is None:
            unknown.append(f"{name} {algo}")
            continue
        found = reading.layers[name] = algorithm.spelling.format
        require_scale(found, reading)
        size = layer.get("group_size") if isinstance(layer, dict) else None
        if size is not None and size != algorithm.group_size:
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


def _check_group(name: str, group: Mapping[str, Any], found: str, reading: Reading) -> None:
    """The numbers of a group of ModelOpt's must be those of the algorithm."""
    algorithm = algorithm_of(found)
    if algorithm.spelling.not_written:
        return  # how ModelOpt writes its numbers is not known here
    where = f"config_groups.{show(name)}"
    inputs = group.get("input_activations")
    numbers = {"weights": group.get("weights"), "input_activations": inputs}
    for what, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, dict):
            reading.problems.append(f"{where}.{what} must be an object, found {show(number)}")
            continue
        expected = {"group_size": None} | algorithm.number
        for key, value in expected.items():
            if key in number and number[key] != value:
                reading.problems.append(
                    f"{where}.{what}.{key} is {show(number[key])}; {found} has {value}"
                )
    is_wrong = find_format(found).input_scale if inputs is None else not algorithm.has_inputs
    if is_wrong:
        reading.problems.append(
            f"{where}.input_activations is {'null' if inputs is None else 'there'}; {found} has "
            f"{'4-bit or 8-bit' if algorithm.has_inputs else '16-bit'} activations"
        )


def unread_algorithms(said: Mapping[str, Any]) -> list[str]:
    """What is said of algorithms of which no source is read, those of single layers included."""
    unknown = sorted(_algorithms_in(said) - READ_IN_SOURCES)
    if not unknown:
        return []
    return [
        f"quant_algo {show_some(unknown)} cannot be read; known are "
        f"{', '.join(sorted(READ_IN_SOURCES))}. Start from the original release"
    ]


def foreign_algorithms(said: Mapping[str, Any]) -> list[str]:
    """What is said of algorithms of ModelOpt's that nothing here reads."""
    found = sorted(_algorithms_in(said) & FOREIGN)
    return [f"quant_algo {', '.join(found)} cannot be read"] if found else []


def _algorithms_in(said: Mapping[str, Any]) -> set[str]:
    """The algorithms that are named, those of single layers included."""
    layers = said.get("quantized_layers")
    entries = [said, *(layers.values() if isinstance(layers, dict) else ())]
    algos = [entry.get("quant_algo") for entry in entries if isinstance(entry, Mapping)]
    return {str(algo).upper() for algo in algos if algo}
