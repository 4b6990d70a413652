"""The largest magnitude of every weight, found once and kept in a file.

    {
      "schema": "moe-ckpt/weight-amax",
      "version": 1,
      "source": "9f2c...",
      "modules": {
        "model.layers.0.mlp.experts.0.gate_proj": 0.6875,
        "model.layers.0.self_attn.q_proj": 1.25
      }
    }

``source`` is a digest of the headers, sizes and modification times of the shards: weights that
changed since may have other magnitudes, and a file of another checkpoint is refused. Gate and up
of an expert have one value.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from ..errors import AmaxError, show
from ..source.checkpoint import Source
from ..source.files import read_regular
from ..source.strict_json import parse_object, show_value, type_name

__all__ = ["amax_text", "read_amax", "source_digest"]

SCHEMA = "moe-ckpt/weight-amax"
VERSION = 1
_CAP_NBYTES = 100_000_000
_AGAIN = "run `moe-ckpt scan` again"


def source_digest(source: Source) -> str:
    """SHA-256 over the headers, sizes and modification times of a checkpoint's shards."""
    state = hashlib.sha256()
    for shard in source.shards.values():
        state.update(f"{shard.name} {shard.nbytes} {shard.mtime_ns}\n".encode())
    for info in source.tensors.values():
        state.update(f"{info.name} {info.dtype} {info.shape} {info.offset}\n".encode())
    return state.hexdigest()


def amax_text(digest: str, modules: Mapping[str, float]) -> str:
    """The file."""
    top = {"schema": SCHEMA, "version": VERSION, "source": digest, "modules": dict(modules)}
    return json.dumps(top, indent=1) + "\n"


def read_amax(file: str | os.PathLike[str], source: Source) -> dict[str, float]:
    """Module -> largest magnitude.

    Raises:
        AmaxError: the file is damaged, or of another checkpoint.
    """
    path = Path(file)
    name = show(path.name)
    text = read_regular(path, _CAP_NBYTES, AmaxError)
    top = parse_object(text, name, AmaxError, remedy=_AGAIN)
    if top.get("schema") != SCHEMA or top.get("version") != VERSION or top["version"] is True:
        raise AmaxError(
            f"{name}: is not weight amax of version {VERSION}; make it with `moe-ckpt scan`"
        )
    if top.get("source") != source_digest(source):
        raise AmaxError(
            f"{name}: was made from another checkpoint, or its shards were written since; {_AGAIN}"
        )
    modules = top.get("modules")
    if not isinstance(modules, dict):
        raise AmaxError(f"{name}: modules must be an object, found {type_name(modules)}; {_AGAIN}")
    for module, amax in modules.items():
        if not _is_magnitude(amax):
            raise AmaxError(
                f'{name}: modules["{show(module)}"]: is {show_value(amax)}; expected a float32 '
                f"magnitude; {_AGAIN}"
            )
    return {module: float(amax) for module, amax in modules.items()}


def _is_magnitude(value: object) -> bool:
    """Whether a JSON value is a number that is not negative and that float32 holds exactly."""
    if not isinstance(value, float | int) or isinstance(value, bool):
        return False
    try:
        return value >= 0 and struct.unpack("f", struct.pack("f", value))[0] == value
    except (OverflowError, struct.error):  # an integer that no float holds
        return False
