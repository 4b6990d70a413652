"""Read what compressed-tensors says of quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import show
from ..reading import Reading, groups_of, require_scale, texts_of
from .match import compressed_readers
from .table import PACKED, SCHEMES, Scheme, scheme_of

__all__ = ["describes", "read_compressed", "unread_schemes"]


def read_compressed(said: Mapping[str, Any], reading: Reading) -> None:
    """Add what is said to a reading."""
    entries = reading.entries = texts_of(said.get("ignore"), "ignore", reading)
    targets: dict[str, str] = {}
    for name, group in groups_of(said, reading).items():
        where = f"config_groups.{show(name)}"
        weights, inputs = group.get("weights"), group.get("input_activations")
        scheme = _scheme_for(weights if isinstance(weights, dict) else {}, inputs)
        if scheme is None:
            reading.problems.append(f"{where}.weights: no known number: {show(weights)}")
            continue
        label, stored = scheme.spelling.format, scheme.stored
        _check_activations(f"{where}.input_activations", inputs, scheme, reading)
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


def _scheme_for(weights: Mapping[str, Any], inputs: Any) -> Scheme | None:
    """The scheme that these are the numbers of; of several, the one whose activations fit."""
    found = [scheme for scheme in SCHEMES if _key(scheme.weights) == _key(weights)]
    structure = weights.get("block_structure")
    if found and structure not in (found[0].weights.get("block_structure", structure), None):
        return None
    as_said = (scheme for scheme in found if (scheme.inputs is None) == (inputs is None))
    return next(as_said, found[0] if found else None)


def _key(weights: Mapping[str, Any]) -> tuple[object, ...]:
    """Kind, bits, strategy and group size, with the library's defaults."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if size else "tensor"
    if strategy in ("tensor", "channel", "block"):
        size = None
    return weights.get("type", "int"), weights.get("num_bits", 8), strategy, size


def _check_activations(where: str, inputs: Any, scheme: Scheme, reading: Reading) -> None:
    """Activations of compressed-tensors must be of a kind that goes with the weights."""
    if inputs is None:
        return
    if not isinstance(inputs, dict):
        reading.problems.append(f"{where} must be an object, found {show(inputs)}")
        return
    if scheme.inputs is None:
        return
    defaults = {"num_bits": 8, "strategy": scheme.inputs["strategy"], "dynamic": False}
    for key, default in defaults.items():
        found, known = inputs.get(key, default), (scheme.inputs[key], *scheme.also.get(key, ()))
        if found not in known:
            expected = " or ".join(map(str, known))
            reading.problems.append(
                f"{where}.{key} is {show(found)}; {scheme.spelling.format} has {expected}"
            )


def unread_schemes(said: Mapping[str, Any]) -> list[str]:
    """What is said of weights of kinds that no source is read of."""
    known = {_kind_and_bits(scheme.weights) for scheme in SCHEMES}
    return [
        f"{show(where)}: weights of type {show(number[0])} and {show(number[1])} bits{form} "
        "cannot be read; known are symmetric float and int of 4 bits, and of 8 bits that are not "
        "packed"
        for where, number, form in _groups_in(said)
        if form or number not in known
    ]


def describes(said: Mapping[str, Any], format_name: str) -> bool:
    """Whether a group has weights of the kind and bits of a format; or no group says any."""
    numbers = {number for _, number, _ in _groups_in(said)}
    return not numbers or _kind_and_bits(scheme_of(format_name).weights) in numbers


def _groups_in(said: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str], str]]:
    """What is said of the weights of each group: where, their kind and bits, and the form.

    That is '' if they are symmetric, with columns in order, and packed only if they are of 4 bits.
    """
    groups = said.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        number = _kind_and_bits(weights)
        stored = group.get("format") or said.get("format")
        is_packed = stored == PACKED and number[0] == "int" and number[1] != "4"
        is_ordered = weights.get("actorder") in (None, False, "weight", "static")
        form = "" if weights.get("symmetric", True) is True else " with zero points"
        form += "" if is_ordered else " with columns out of order (actorder)"
        form += " packed into words" if is_packed else ""
        yield f"config_groups.{name}", number, form


def _kind_and_bits(weights: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and bits, as text for they may be anything."""
    return str(weights.get("type", "int")), str(weights.get("num_bits", 8))
