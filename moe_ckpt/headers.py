"""The header of a safetensors file, read strictly.

The rules are those of the format (a header of at most 100 MB, offsets contiguous from 0, bytes
equal to shape times dtype, nothing after the last tensor), with duplicate keys refused as well.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .dtypes import BITS
from .errors import CheckpointError, show
from .regular import open_regular
from .strict_json import parse_object, type_name

__all__ = ["Shard", "TensorInfo", "read_header"]

HEADER_CAP_NBYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a source shard; ``offset`` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the source, as it was when its header was read."""

    name: str
    path: Path
    nbytes: int
    mtime_ns: int


def read_header(path: Path) -> tuple[Shard, list[TensorInfo]]:
    """Read and check the header of one safetensors file.

    Returns:
        The shard, and its tensors in the order of their bytes.

    Raises:
        CheckpointError: naming the file, and the tensor where one is at fault.
    """
    name = path.name
    if not os.path.lexists(path):
        raise CheckpointError(f"{show(name)}: shard is missing; download the checkpoint again")
    fd, status = open_regular(path, CheckpointError)
    with os.fdopen(fd, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or length > HEADER_CAP_NBYTES or 8 + length > status.st_size:
            raise CheckpointError(
                f"{show(name)}: is not a safetensors file or was cut short: it has "
                f"{status.st_size} bytes and its header claims {length}; download it again"
            )
        text = file.read(length)
    header = parse_object(text, f"{show(name)}: header", CheckpointError)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{show(name)}: header: __metadata__ must map text to text")
    data_nbytes = status.st_size - 8 - length
    infos = sorted(
        (_tensor_info(name, key, entry, 8 + length, data_nbytes) for key, entry in header.items()),
        key=lambda info: (info.offset, info.nbytes),
    )
    position = 8 + length
    for info in infos:
        if info.offset != position:
            raise CheckpointError(
                f"{show(name)}: {show(info.name)}: starts at byte {info.offset}, expected "
                f"{position}"
            )
        position += info.nbytes
    if position != status.st_size:
        raise CheckpointError(
            f"{show(name)}: holds {data_nbytes} bytes of tensors, its header describes "
            f"{position - 8 - length}; download it again"
        )
    return Shard(name, path, status.st_size, status.st_mtime_ns), infos


def _tensor_info(
    shard: str, name: str, entry: Any, data_start: int, data_nbytes: int
) -> TensorInfo:
    where = f"{show(shard)}: {show(name)}"
    if not name.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in name):
        raise CheckpointError(f"{where}: name is not valid Unicode")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: header entry is {type_name(entry)}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: dtype {show(dtype)} is unknown")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape {show(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {show(offsets)} are not two positions")
    bits = _bits_of(dtype, shape, 8 * data_nbytes)
    if bits is None or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        needs = "more than the file has" if bits is None else f"{bits / 8:g}"
        raise CheckpointError(
            f"{where}: {dtype} {show(shape)} needs {needs} bytes, data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    nbytes = bits // 8
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + offsets[0], nbytes)


def _bits_of(dtype: str, shape: list[int], limit: int) -> int | None:
    """Bits of a tensor; None if they exceed the limit, without multiplying huge numbers."""
    if 0 in shape:
        return 0
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits > limit:
            return None
    return bits


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers in [0, 2**63)."""
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )
