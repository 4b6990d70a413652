"""The header of a safetensors file, read strictly.

The rules are those of the format (a header of at most 100 MB, offsets contiguous from 0, bytes
equal to shape times dtype, nothing after the last tensor), with duplicate keys refused as well.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..dtypes import BITS
from ..errors import CheckpointError, show
from .files import impostor, open_regular, read_failure
from .strict_json import parse_object, show_value, type_name

__all__ = ["Shard", "TensorInfo", "read_header"]

HEADER_CAP_NBYTES = 100_000_000
_SIZE_CAP = 2**63
_DAMAGED = "the file is damaged, download it again"


class TensorInfo(NamedTuple):
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
        EnvironmentFaultError: the disk failed.
    """
    name = path.name
    if not os.path.lexists(path):
        raise CheckpointError(f"{show(name)}: shard is missing; download the checkpoint again")
    fd, status = open_regular(path, CheckpointError)
    try:
        with os.fdopen(fd, "rb") as file:
            text = _header_text(file, name, status.st_size)
    except OSError as error:
        raise read_failure(error, name, CheckpointError) from None
    length = len(text)
    header = parse_object(text, f"{show(name)}: header", CheckpointError, remedy=_DAMAGED)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{show(name)}: header: __metadata__ must map text to text; {_DAMAGED}"
        )
    data_nbytes = status.st_size - 8 - length
    entries = _Entries(name, 8 + length, data_nbytes)
    infos = [entries.tensor(key, entry) for key, entry in header.items()]
    infos.sort(key=attrgetter("offset", "nbytes"))
    position = 8 + length
    for info in infos:
        if info.offset != position:
            raise CheckpointError(
                f"{show(name)}: {show(info.name)}: starts at byte {info.offset}, expected "
                f"{position}, where the tensor before it ends; {_DAMAGED}"
            )
        position += info.nbytes
    if position != status.st_size:
        raise CheckpointError(
            f"{show(name)}: holds {data_nbytes} bytes of tensors, its header describes "
            f"{position - 8 - length}; download it again"
        )
    return Shard(name, path, status.st_size, status.st_mtime_ns), infos


def _header_text(file: BinaryIO, name: str, nbytes: int) -> bytes:
    """The JSON of a header, from the start of a file of ``nbytes``."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length == 0 or length > HEADER_CAP_NBYTES or 8 + length > nbytes:
        if what_it_is := impostor(start + file.read(64)):
            raise CheckpointError(f"{show(name)}: {what_it_is}")
        raise CheckpointError(
            f"{show(name)}: is not a safetensors file or was cut short: it has {nbytes} bytes and "
            f"its header claims {length}; download it again"
        )
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{show(name)}: was cut short while it was read; run again")
    return text


class _Entries:
    """The entries of one header, checked one by one; all data is ``nbytes`` from ``start`` on.

    Most tensors of a shard have a dtype and shape that an earlier one had, and share its values.
    """

    def __init__(self, shard: str, start: int, nbytes: int) -> None:
        self._shard = shard
        self._start = start
        self._limit = 8 * nbytes
        self._known: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}

    def tensor(self, name: str, entry: Any) -> TensorInfo:
        """One tensor; `CheckpointError` if its entry is not sound."""
        if not name.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in name):
            raise self._error(name, "name is not valid Unicode")
        if not isinstance(entry, dict):
            raise self._error(name, f"header entry is {type_name(entry)}, not an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self._error(name, f"dtype {show_value(dtype)} is unknown")
        sizes = _sizes(shape)
        if sizes is None:
            raise self._error(name, f"shape {show_value(shape)} is not a list of sizes")
        positions = _sizes(offsets)
        if positions is None or len(positions) != 2:
            raise self._error(name, f"data_offsets {show_value(offsets)} are not two positions")
        known = self._known.get((dtype, sizes))
        start, end = positions
        if known is None or end - start != known[2]:
            bits = _bits_of(dtype, sizes, self._limit)
            if bits is None or bits % 8 or end - start != bits // 8:
                needs = (
                    f"more than the {self._limit // 8} bytes of data in the file"
                    if bits is None
                    else f"{bits / 8:.15g} bytes"
                )
                raise self._error(
                    name,
                    f"{dtype} {show_value(shape)} needs {needs}, data_offsets give {end - start}",
                )
            known = self._known[dtype, sizes] = (dtype, sizes, bits // 8)
        dtype, sizes, nbytes = known
        return TensorInfo(name, dtype, sizes, self._shard, self._start + start, nbytes)

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{show(self._shard)}: {show(name)}: {problem}; {_DAMAGED}")


def _bits_of(dtype: str, shape: tuple[int, ...], limit: int) -> int | None:
    """Bits of a tensor; None if they exceed the limit, without multiplying huge numbers."""
    if 0 in shape:
        return 0
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits > limit:
            return None
    return bits


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A JSON list of integers in [0, 2**63); None for anything else."""
    if not isinstance(value, list):
        return None
    for n in value:
        if type(n) is not int or not 0 <= n < _SIZE_CAP:
            return None
    return tuple(value)
