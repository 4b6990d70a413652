"""Reading outputs with the safetensors library, and making checkpoints of headers alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import deserialize

FIXTURES = Path(__file__).parents[2] / "fixtures"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            assert name not in found
            found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the private ones, name -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".moe-ckpt" not in path.parts
    }


def read_json(path: Path):
    return json.loads(path.read_text())


def write_headers(
    folder: Path, shards: dict[str, dict[str, tuple[str, list[int]]]], config
) -> Path:
    """A checkpoint whose weights are all zero and take no disk: name -> (dtype, shape)."""
    bits = {"BF16": 16, "F16": 16, "F32": 32, "I64": 64, "U8": 8, "F8_E4M3": 8, "BOOL": 8}
    bits |= {"I8": 8, "I32": 32, "U32": 32, "F8_E8M0": 8}
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        header, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * bits[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
