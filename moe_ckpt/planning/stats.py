"""Activation statistics from a calibration run.

    {
      "schema": "moe-ckpt/stats",
      "version": 1,
      "num_tokens": 262144,
      "modules": {
        "model.layers.0.self_attn.q_proj": {"input_amax": 7.25, "num_tokens": 262144},
        "model.layers.0.self_attn.k_proj": {"input_amax": 7.25, "output_amax": 11.5},
        "model.layers.0.mlp.experts.gate_up_proj": {"input_amax": [6.5, null, 6.1]},
        "model.layers.0.mlp.experts.0.down_proj": {"input_amax": 0.6}
      }
    }

``input_amax`` is the largest magnitude that a module read. For fused experts it may be a list,
one entry for each expert; null and 0 mean that no token was routed to it. Several files are
merged by maximum. ``output_amax`` is the largest magnitude that a module put out; of k_proj and
v_proj it gives the scales of an FP8 KV cache. This module knows the schema, not the model.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import Problems, StatsError, show, show_some
from ..source.files import read_regular
from ..source.strict_json import parse_object, show_value, type_name

__all__ = ["Amax", "Stats", "read_stats"]

SCHEMA = "moe-ckpt/stats"
VERSION = 1
_CAP_NBYTES = 100_000_000
_AGAIN = "calibrate again"
_TOP_KEYS = {"schema", "version", "num_tokens", "modules"}
_MODULE_KEYS = {"input_amax", "output_amax", "num_tokens"}
_F32_MAX = 3.4028234663852886e38

# One number, or one entry for each expert; None where no token was seen.
Amax = float | tuple[float | None, ...] | None


@dataclass(frozen=True, slots=True)
class Stats:
    """Merged statistics: ``input_amax`` and the JSON path of each module's entry.

    ``output_amax`` holds the modules that have one.
    """

    input_amax: Mapping[str, Amax]
    output_amax: Mapping[str, float]
    paths: Mapping[str, str]
    notes: tuple[str, ...]


def read_stats(
    files: Iterable[str | os.PathLike[str]], name_of: Callable[[str], str] = str
) -> Stats:
    """Read and merge statistics files.

    ``name_of`` gives a module that a file names the name by which it is looked up.

    Raises:
        StatsError: naming the file and the JSON path of every problem.
    """
    problems = Problems()
    merged: dict[str, Amax] = {}
    outputs: dict[str, float] = {}
    paths: dict[str, str] = {}
    notes: list[str] = []
    for file in files:
        path = Path(file)
        read = problems.catch(partial(_read, path))
        if read is None:
            continue
        modules, put_out, more = read
        notes += more
        for module, magnitude in put_out.items():
            name = name_of(module)
            outputs[name] = max(magnitude, outputs.get(name, magnitude))
        for module, amax in modules.items():
            name = name_of(module)
            where = f'{show(path.name)}: modules["{show(module)}"].input_amax'
            try:
                merged[name] = _merge(merged[name], amax, where) if name in merged else amax
            except StatsError as error:
                problems.absorb(error)
            if name not in paths or isinstance(amax, tuple):
                paths[name] = where
    problems.check()
    return Stats(merged, outputs, paths, tuple(notes))


def _read(path: Path) -> tuple[dict[str, Amax], dict[str, float], list[str]]:
    file = show(path.name)
    text = read_regular(path, _CAP_NBYTES, StatsError)
    # NaN and Infinity are refused below, with their path.
    top = parse_object(text, file, StatsError, constants=True, remedy=_AGAIN)
    if top.get("schema") != SCHEMA:
        raise StatsError(
            f'{file}: schema is {show_value(top.get("schema"))}, expected "{SCHEMA}"; give a file '
            "of activation statistics"
        )
    if top.get("version") != VERSION or isinstance(top.get("version"), bool):
        raise StatsError(
            f"{file}: version is {show_value(top.get('version'))}, this moe-ckpt reads {VERSION}; "
            f"{_AGAIN}"
        )
    modules = top.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise StatsError(
            f"{file}: modules must be an object that names modules, found {type_name(modules)}; "
            f"{_AGAIN}"
            if modules != {}
            else f"{file}: modules is empty; calibrate the model again"
        )
    problems = Problems()
    found: dict[str, Amax] = {}
    outputs: dict[str, float] = {}
    unknown = [key for key in top if key not in _TOP_KEYS]
    for name, entry in modules.items():
        where = f'{file}: modules["{show(name)}"]'
        if not isinstance(entry, dict):
            what = f"{where}: must be an object, found {type_name(entry)}; {_AGAIN}"
            problems.add(StatsError, what)
            continue
        unknown += [key for key in entry if key not in _MODULE_KEYS and key not in unknown]
        tokens = entry.get("num_tokens", 0)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            what = f"{where}.num_tokens: must be a count, found {show_value(tokens)}; {_AGAIN}"
            problems.add(StatsError, what)
        try:
            if entry.get("output_amax") is not None:
                outputs[name] = _number(entry["output_amax"], f"{where}.output_amax") or 0.0
            if "input_amax" in entry:  # an entry may hold only keys of later versions
                found[name] = _amax(entry["input_amax"], f"{where}.input_amax")
        except StatsError as error:
            problems.absorb(error)
    problems.check()
    notes = [f"{file}: keys unknown to this version were ignored: {show_some(unknown)}"]
    return found, outputs, notes if unknown else []


def _amax(value: Any, where: str) -> Amax:
    if isinstance(value, list):
        if not value:
            raise StatsError(f"{where}: is an empty list; expected one entry for each expert")
        return tuple(_number(entry, f"{where}[{expert}]") for expert, entry in enumerate(value))
    return _number(value, where)


def _number(value: Any, where: str) -> float | None:
    """A magnitude that a float32 can hold; None for null and 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise StatsError(f"{where}: must be a number, found {type_name(value)}; {_AGAIN}")
    if not 0 <= value <= _F32_MAX:  # false for NaN, and exact for integers of any size
        shown = "NaN" if value != value else show(value) if value < 1e300 else "too large"
        raise StatsError(f"{where}: is {shown}; expected a finite magnitude, at least 0; {_AGAIN}")
    as_float32: float = struct.unpack("f", struct.pack("f", value))[0]
    return as_float32 or None


def _merge(one: Amax, two: Amax, where: str) -> Amax:
    """The maximum, entry by entry; a number against a list counts for every expert."""
    if isinstance(one, tuple) and isinstance(two, tuple):
        if len(one) != len(two):
            raise StatsError(
                f"{where}: has {len(two)} entries, another stats file has {len(one)} for this "
                "module"
            )
        return tuple(largest(pair) for pair in zip(one, two, strict=True))
    if isinstance(one, tuple):
        return tuple(largest((entry, two)) for entry in one)  # type: ignore[arg-type]
    if isinstance(two, tuple):
        return tuple(largest((entry, one)) for entry in two)
    return largest((one, two))


def largest(amax: Iterable[float | None]) -> float | None:
    """The largest known magnitude; None if none is known."""
    known = [value for value in amax if value is not None]
    return max(known) if known else None
