"""A small sound checkpoint, and what catalogues of bad input are made of: one change each.

A case changes the folder that it is given: ``in/`` is the checkpoint, ``stats.json`` statistics
that fit it, and what a case makes beside them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

E, I, H = 4, 32, 64
INDEX = "model.safetensors.index.json"
S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXPERTS = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": E,
    "moe_intermediate_size": I,
    "hidden_size": H,
    "num_hidden_layers": 1,
}
NBYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I64": 8}
SHAPES = {GATE_UP: [E, 2 * I, H], DOWN: [E, H, I], NORM: [H], Q: [H, H], ROUTER: [E, H]}
SHARD_OF = {GATE_UP: S1, DOWN: S1, NORM: S2, Q: S2, ROUTER: S2}

Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One bad input.

    ``says``: what the same line of stderr must hold, all of it. ``args``: more arguments, in
    which {} is the folder of the case. ``is_late``: found only when weights are read.
    """

    name: str
    edit: Edit
    says: tuple[str, ...]
    code: int = 3
    args: tuple[str, ...] = ()
    in_dir: str = "in"
    out_dir: str = "out"
    is_late: bool = False


def packed(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header and data; ``length`` is what the file says of the header."""
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(names: list[str], dtype: str = "BF16") -> tuple[dict[str, Any], int]:
    """Entries of tensors of the checkpoint one behind the other, and their bytes."""
    header, end = {}, 0
    for name in names:
        start, count = end, 1
        for size in SHAPES[name]:
            count *= size
        end = start + count * NBYTES[dtype]
        header[name] = {"dtype": dtype, "shape": SHAPES[name], "data_offsets": [start, end]}
    return header, end


def json_bytes(document: object) -> bytes:
    return json.dumps(document).encode()


def names_in(shard: str) -> list[str]:
    return [name for name, of in SHARD_OF.items() if of == shard]


def weights(nbytes: int) -> bytes:
    """BF16 from 1 to 2 and -1 to -2, in no order that repeats soon."""
    pattern = bytes(b for n in range(251) for b in ((n * 37) % 128, 0x3F | ((n % 3 == 0) << 7)))
    return (pattern * (nbytes // len(pattern) + 1))[:nbytes]


def make(folder: Path) -> None:
    """The sound checkpoint and its statistics."""
    root = folder / "in"
    root.mkdir()
    for shard in (S1, S2):
        header, end = header_of(names_in(shard))
        (root / shard).write_bytes(packed(json.dumps(header).encode(), weights(end)))
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": SHARD_OF}))
    (root / "config.json").write_text(json.dumps(CONFIG))
    modules = {GATE_UP: {"input_amax": 2.0}, DOWN: {"input_amax": [1.0, 2.0, 3.0, 4.0]}}
    write_stats(folder, modules)


def write_stats(folder: Path, modules: object, **top: object) -> None:
    document = {"schema": "moe-ckpt/stats", "version": 1, "modules": modules} | top
    (folder / "stats.json").write_text(json.dumps(document))


def replace(file: str, make_it: Callable[[Path], object]) -> Edit:
    """Put something else in the place of a file."""

    def edit(folder: Path) -> None:
        path = folder / file
        if os.path.lexists(path):
            path.unlink()
        make_it(path)

    return edit


def content(file: str, data: bytes | str) -> Edit:
    """Other content of a file."""
    text = data.encode() if isinstance(data, str) else data
    return replace(file, lambda path: path.write_bytes(text))


def is_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (is_folder, "not a regular file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a dangling link": (lambda path: path.symlink_to("nothing"), "nothing"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


def sparse(path: Path, nbytes: int, start: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(nbytes)
