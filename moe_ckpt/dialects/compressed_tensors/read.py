"""Read what compressed-tensors says of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import show
from ..reading import Reading, groups_of, require_scale, texts_of
from .match import compressed_readers

__all__ = ["read_compressed"]

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


def read_compressed(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what is said to a reading."""
    entries = reading.entries = texts_of(said.get("ignore"), "ignore", reading)
    targets: dict[str, str] = {}
    for name, group in groups_of(said, reading).items():
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
            require_scale(label, reading)
        packed = group.get("format") or said.get("format")
        if packed not in (stored, "mixed-precision", None):
            reading.problems.append(f"{where}: format is {show(packed)}; {label} is {stored}")
        for target in texts_of(group.get("targets"), f"{where}.targets", reading):
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
