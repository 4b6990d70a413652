"""What each runtime makes of a configuration, whoever wrote it: the format of every module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..announced import Announced
from ..dialects.match_compressed import compressed_readers
from ..dialects.match_fp8 import fp8_readers
from ..dialects.match_modelopt import RUNTIMES, mixed_readers
from ..dialects.matching import SGLANG, TRANSFORMERS, TRTLLM, VLLM, Built, Reader, Rule
from ..errors import show, show_some
from .expressions import problem_with

__all__ = ["Reading", "format_of_algo", "read_config"]

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
_BLOCKS = {(128, 128): "fp8-block", (1, 32): "mxfp8"}
# Kind, bits, strategy, group size -> format of compressed-tensors, and how that is stored.
_NUMBERS: Mapping[tuple[object, ...], tuple[str, str]] = {
    ("float", 4, "tensor_group", 16): ("nvfp4", "nvfp4-pack-quantized"),
    ("float", 4, "group", 32): ("mxfp4", "mxfp4-pack-quantized"),
    ("float", 8, "group", 32): ("mxfp8", "mxfp8-quantized"),
    ("float", 8, "tensor", None): ("fp8-tensor", "float-quantized"),
    ("float", 8, "channel", None): ("fp8-channel", "float-quantized"),
    ("float", 8, "block", None): ("fp8-block", "float-quantized"),
    ("int", 8, "channel", None): ("int8-channel", "int-quantized"),
    **{("int", 4, "group", size): (f"int4-g{size}", "pack-quantized") for size in (128, 64, 32)},
}


_NAMES_OF_MODELOPT = ("modelopt", *(f"modelopt_{of}" for of in ("fp4", "fp8", "mixed", "mxfp8")))


@dataclass(slots=True)
class Reading:
    """How runtimes read what one file says.

    ``readers``: runtime -> the format of a module. ``static``: formats whose activations have a
    scale that must be stored. ``problems``: what is wrong with the words themselves.
    ``entries``: the list of what is not quantized. ``layers``: module -> format, of a mix.
    """

    readers: dict[str, Reader] = field(default_factory=dict)
    static: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    entries: tuple[str, ...] = ()
    layers: dict[str, str] = field(default_factory=dict)
    has_list: bool = False


def format_of_algo(algo: object) -> str | None:
    """The format that ModelOpt's name of an algorithm stands for."""
    return _ALGOS.get(str(algo).upper())


def read_config(said: Announced) -> Reading:
    """Read what one file says of quantization."""
    reading = Reading()
    read = _METHODS.get(said.method)
    named = said.said.get("quant_method")
    if "quant_method" not in said.said:
        reading.problems.append("has no quant_method, by which runtimes know what it is")
    elif read is None or (said.method == "modelopt" and named not in _NAMES_OF_MODELOPT):
        reading.problems.append(
            f"quant_method {show(named)!r} is unknown; known are {', '.join(_METHODS)}"
        )
    if read is None:
        return reading
    _check_kv_cache(said.said, said.method, reading)
    read(said.said, reading)
    return reading


def _check_kv_cache(said: Mapping[str, Any], method: str, reading: Reading) -> None:
    """What is said of the KV cache: vLLM knows one kind of compressed-tensors."""
    algo, scheme = said.get("kv_cache_quant_algo"), said.get("kv_cache_scheme")
    if algo is not None and not isinstance(algo, str):
        reading.problems.append(f"kv_cache_quant_algo is {show(algo)}; expected a name or null")
    if scheme is None:
        return
    number = (scheme.get("num_bits"), scheme.get("type")) if isinstance(scheme, dict) else ()
    if not number or (method == "compressed-tensors" and number != (8, "float")):
        reading.problems.append(
            f"kv_cache_scheme is {show(scheme)}; expected numbers of 8 bits, type float, or null"
        )


def _texts(value: Any, key: str, reading: Reading) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        reading.has_list = True
        return tuple(entry for entry in value if _is_usable(entry, key, reading))
    reading.problems.append(f'"{key}" must be a list of names, found {show(value)}')
    return ()


def _is_usable(entry: str, key: str, reading: Reading) -> bool:
    """Whether a name, pattern or expression can be matched in bounded time."""
    expression = entry[3:] if entry.startswith("re:") else entry.replace("*", ".*")
    plain = expression.replace(".", "").replace("_", "").isalnum()
    problem = "" if plain else problem_with(expression)
    if problem:
        reading.problems.append(f'"{key}": {show(entry)}: {problem}')
    return not problem


def _first_of(said: Mapping[str, Any], *keys: str) -> tuple[str, Any]:
    """The first of some keys that is there, and its value."""
    return next(((key, said[key]) for key in keys if key in said), (keys[0], None))


def _modelopt(said: Mapping[str, Any], reading: Reading) -> None:
    key, listed = _first_of(said, "ignore", "exclude_modules")
    entries = reading.entries = _texts(listed, key, reading)
    algo = str(said.get("quant_algo", "")).upper()
    groups = _groups(said, reading)
    if algo == "MIXED_PRECISION":
        _modelopt_mix(said, groups, reading)
        return
    found = format_of_algo(algo)
    if found is None:
        reading.problems.append(
            f"quant_algo {show(said.get('quant_algo'))!r} is unknown; known are "
            f"{', '.join(_ALGOS)}, MIXED_PRECISION"
        )
        return
    if found == "nvfp4" and groups and not any(g.get("input_activations") for g in groups.values()):
        found = "nvfp4-w4a16"  # as vLLM takes it
    _static(found, reading)
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


def _static(found: str, reading: Reading) -> None:
    if found in ("nvfp4", "fp8-tensor"):
        reading.static.add(found)


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
        found = format_of_algo(algo)
        if found is None:
            unknown.append(f"{name} {algo}")
            continue
        reading.layers[name] = found
        _static(found, reading)
        size = layer.get("group_size") if isinstance(layer, dict) else None
        wanted = {"nvfp4": 16, "nvfp4-w4a16": 16, "mxfp8": 32, "fp8-block": 128}.get(found)
        if size is not None and size != wanted:
            reading.problems.append(f"quantized_layers: {show(name)}: group_size is {show(size)}")
    if unknown:
        reading.problems.append(f"quantized_layers: {show_some(unknown)}: unknown quant_algo")
    for name, group in groups.items():
        named = _texts(group.get("targets"), f"config_groups.{show(name)}.targets", reading)
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


def _groups(said: Mapping[str, Any], reading: Reading) -> dict[str, Mapping[str, Any]]:
    groups = said.get("config_groups")
    if groups is None:
        return {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        reading.problems.append('"config_groups" must be an object of groups')
        return {}
    return groups


def _compressed(said: Mapping[str, Any], reading: Reading) -> None:
    entries = reading.entries = _texts(said.get("ignore"), "ignore", reading)
    targets: dict[str, str] = {}
    for name, group in _groups(said, reading).items():
        where = f"config_groups.{show(name)}"
        weights = group.get("weights")
        found = _number_of(weights if isinstance(weights, dict) else {})
        if found is None:
            reading.problems.append(f"{where}.weights: no known number: {show(weights)}")
            continue
        label, stored = found
        inputs = group.get("input_activations")
        if label == "nvfp4" and inputs is None:
            label = "nvfp4-w4a16"
        _check_activations(f"{where}.input_activations", inputs, label, reading)
        if isinstance(inputs, dict) and inputs.get("dynamic") in (False, None, "local"):
            _static(label, reading)
        packed = group.get("format") or said.get("format")
        if packed not in (stored, "mixed-precision", None):
            reading.problems.append(f"{where}: format is {show(packed)}; {label} is {stored}")
        for target in _texts(group.get("targets"), f"{where}.targets", reading):
            targets[target] = label
    if not targets:
        reading.problems.append('"config_groups" has no targets: nothing is quantized')
        return
    reading.readers = compressed_readers(entries, targets)


# format -> bits, strategies and "dynamic" of activations that runtimes know
_ACTIVATIONS: Mapping[str, tuple[int, tuple[str, ...], tuple[object, ...]]] = {
    "nvfp4": (4, ("tensor_group",), ("local", False)),
    "mxfp4": (4, ("group",), (True,)),
    "mxfp8": (8, ("group",), (True,)),
    "fp8-tensor": (8, ("tensor", "token"), (True, False)),
    "fp8-channel": (8, ("token",), (True,)),
    "fp8-block": (8, ("group", "token"), (True,)),
    "int8-channel": (8, ("token",), (True,)),
}


def _check_activations(where: str, inputs: Any, label: str, reading: Reading) -> None:
    """Activations of compressed-tensors must be of a kind that goes with the weights."""
    if inputs is None:
        return
    if not isinstance(inputs, dict):
        reading.problems.append(f"{where} must be an object, found {show(inputs)}")
        return
    if label not in _ACTIVATIONS:
        return
    bits, strategies, dynamic = _ACTIVATIONS[label]
    for key, found, known in (
        ("num_bits", inputs.get("num_bits", 8), (bits,)),
        ("strategy", inputs.get("strategy", strategies[0]), strategies),
        ("dynamic", inputs.get("dynamic", False), dynamic),
    ):
        if found not in known:
            expected = " or ".join(map(str, known))
            reading.problems.append(f"{where}.{key} is {show(found)}; {label} has {expected}")


def _number_of(weights: Mapping[str, Any]) -> tuple[str, str] | None:
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if size else "tensor"
    if strategy in ("tensor", "channel", "block"):
        size = None
    if strategy == "block" and weights.get("block_structure") not in ([128, 128], None):
        return None
    try:
        return _NUMBERS.get((kind, bits, strategy, size))
    except TypeError:  # a list or an object where a number should be
        return None


def _fp8(said: Mapping[str, Any], reading: Reading) -> None:
    block = said.get("weight_block_size")
    found: str | None = "fp8-tensor"
    if block is not None:
        sizes = tuple(block) if isinstance(block, list) else ()
        found = _BLOCKS.get(sizes) if all(isinstance(n, int) for n in sizes) else None
    if found is None:
        reading.problems.append(
            f"weight_block_size is {show(block)}; runtimes know [128, 128] and MX's [1, 32]"
        )
        return
    if found == "fp8-tensor" and said.get("activation_scheme") == "static":
        reading.static.add(found)
    if said.get("activation_scheme") not in ("dynamic", "static"):
        reading.problems.append(
            f"activation_scheme is {show(said.get('activation_scheme'))}; expected dynamic"
        )
    _listed(said, found, reading)


def _listed(said: Mapping[str, Any], found: str, reading: Reading) -> None:
    key, listed = _first_of(said, "modules_to_not_convert", "ignored_layers")
    entries = reading.entries = _texts(listed, key, reading)
    reading.readers = fp8_readers(entries, found)
    if key == "ignored_layers":
        reading.readers.pop(TRANSFORMERS)  # it reads the other key only


def _mxfp8(said: Mapping[str, Any], reading: Reading) -> None:
    _listed(said, "mxfp8", reading)


def _fbgemm(said: Mapping[str, Any], reading: Reading) -> None:
    _listed(said, "fp8-channel", reading)


def _mxfp4(said: Mapping[str, Any], reading: Reading) -> None:
    """All runtimes quantize the experts, and read no list for them."""
    key, listed = _first_of(said, "modules_to_not_convert", "ignored_layers")
    reading.entries = _texts(listed, key, reading)

    def read(module: Built) -> str | None:
        return "mxfp4" if module.is_experts else None

    names: Iterable[str] = (VLLM, SGLANG, TRTLLM, TRANSFORMERS)
    reading.readers = dict.fromkeys(names, read)


_METHODS: dict[str, Callable[[Mapping[str, Any], Reading], None]] = {
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
}
