"""Copies of checkpoints with something changed, for tests of what is found."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from kit.files import Tensor, read_json
from safetensors import deserialize

from moe_ckpt.plan import OutTensor
from moe_ckpt.texts import header_of

INDEX = "model.safetensors.index.json"


def copy(source: Path, folder: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(source, folder / "copy"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard."""
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in sorted(deserialize(path.read_bytes()))
    }


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard of these tensors, whatever they hold."""
    header = header_of(tuple(OutTensor(n, t.dtype, t.shape) for n, t in tensors.items()))
    path.write_bytes(header + b"".join(tensor.data for tensor in tensors.values()))


def shard_of(folder: Path, name: str) -> Path:
    """The shard with a tensor."""
    return next(path for path in folder.glob("*.safetensors") if name in tensors_of(path))


def change(folder: Path, name: str, **fields: object) -> None:
    """Change dtype, shape or data of a tensor."""
    path = shard_of(folder, name)
    tensors = tensors_of(path)
    tensors[name] = replace(tensors[name], **fields)
    write_shard(path, tensors)


def poke(folder: Path, name: str, data: bytes, at: int = 0) -> None:
    """Overwrite bytes of a tensor."""
    old = tensors_of(shard_of(folder, name))[name].data
    change(folder, name, data=old[:at] + data + old[at + len(data) :])


def delete(folder: Path, *names: str) -> None:
    """Remove tensors from their shard, and from the index if there is one."""
    for name in names:
        path = shard_of(folder, name)
        tensors = tensors_of(path)
        del tensors[name]
        write_shard(path, tensors)
    if (folder / INDEX).exists():
        edit_json(folder / INDEX, lambda index: [index["weight_map"].pop(n) for n in names])


def add(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    """Add a tensor to the first shard."""
    path = min(folder.glob("*.safetensors"))
    write_shard(path, tensors_of(path) | {name: Tensor(dtype, shape, data)})


def edit_json(path: Path, edit) -> None:
    """Edit what a JSON file holds in place."""
    value = read_json(path)
    edit(value)
    path.write_text(json.dumps(value))


def quantization(folder: Path, edit) -> None:
    """Edit what config.json and hf_quant_config.json say, the same way."""
    edit_json(folder / "config.json", lambda config: edit(config["quantization_config"]))
    beside = folder / "hf_quant_config.json"
    if beside.exists():
        edit_json(beside, lambda value: edit(value["quantization"]))


def listed(said: dict) -> list[str]:
    """The list of what is not quantized, in whichever file."""
    keys = ("ignore", "exclude_modules", "modules_to_not_convert")
    return next(said[key] for key in keys if key in said)


def float32(value: float) -> bytes:
    """A number as it is stored."""
    return struct.pack("<f", value)
