"""A checkpoint folder, read without its weights: headers, index, config and side files.

The header rules are those of the safetensors format (a header of at most 100 MB, offsets
contiguous from 0, bytes equal to shape times dtype, nothing after the last tensor), with
duplicate keys refused as well.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .dtypes import BITS
from .errors import CheckpointError, Problems, show, show_some
from .regular import open_regular, read_regular
from .strict_json import parse_object, type_name

__all__ = ["Shard", "SideFile", "Source", "TensorInfo", "open_source", "read_header"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_CAP_NBYTES = 100_000_000
_JSON_CAP_NBYTES = 100_000_000

# Weights in other formats: loaders would find them beside ours, and pickles can run code.
_OTHER_WEIGHTS = (
    ".bin .ckpt .gguf .h5 .mlmodel .msgpack .npy .npz .onnx .ot .pickle .pkl .pt .pth .safetensors"
).split()
_SKIPPED_FOLDERS = {".cache", ".git", ".moe-ckpt", "original"}
_REWRITTEN = {CONFIG, INDEX, "hf_quant_config.json"}


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


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file copied as it is; ``name`` is its path relative to the checkpoint, ``/`` separated."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint whose headers, index and config agree with each other."""

    root: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def open_source(folder: str | os.PathLike[str]) -> Source:
    """Read everything but the weights of a checkpoint folder.

    Raises:
        CheckpointError: with every damaged, missing or contradictory file that was found.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise CheckpointError(f"{show(root)}: is not a folder with a checkpoint")
    try:
        return _open_source(root)
    except OSError as error:
        where = show(error.filename or root)
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None


def _open_source(root: Path) -> Source:
    config = parse_object(
        read_regular(root / CONFIG, _JSON_CAP_NBYTES, CheckpointError),
        CONFIG,
        CheckpointError,
        constants=True,  # transformers writes Infinity, e.g. for time_step_limit
    )
    weight_map, warnings = _find_shards(root)
    problems = Problems()
    shards: dict[str, Shard] = {}
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())) if weight_map else [_only_shard(root)]:
        try:
            shard, found = read_header(root / name)
        except CheckpointError as error:
            problems.absorb(error)
            continue
        shards[name] = shard
        for info in found:
            if info.name in tensors:
                problems.add(
                    CheckpointError,
                    f"{show(info.name)}: is in two shards, {tensors[info.name].shard} and {name}",
                )
            tensors[info.name] = info
    problems.check()
    if weight_map:
        warnings += _compare_with_index(weight_map, tensors)
    side_files, left_out, more = _side_files(root, set(shards))
    return Source(
        root=root,
        config=config,
        shards=shards,
        tensors=tensors,
        side_files=tuple(side_files),
        left_out=tuple(left_out),
        warnings=(*warnings, *more),
    )


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


def _find_shards(root: Path) -> tuple[dict[str, str], list[str]]:
    """The weight_map of the index ({} if there is none), and warnings about other shards."""
    if not os.path.lexists(root / INDEX):
        return {}, []
    index = parse_object(
        read_regular(root / INDEX, _JSON_CAP_NBYTES, CheckpointError), INDEX, CheckpointError
    )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{INDEX}: "weight_map" must be an object that names each tensor\'s shard, found '
            f"{type_name(weight_map)}"
        )
    problems = Problems()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _safe_shard_name(shard):
            problems.add(
                CheckpointError,
                f'{INDEX}: weight_map["{show(tensor)}"] is {show(shard)!r}; expected the plain '
                "name of a .safetensors file in the same folder",
            )
    problems.check()
    strays = _shards_in(root) - set(weight_map.values())
    if SINGLE in strays:
        raise CheckpointError(
            f"{SINGLE}: stands beside {INDEX}, which does not name it; loaders disagree on which "
            "to read. Remove the stale one"
        )
    if strays:
        return weight_map, [f"left out, the index does not name it: {show_some(sorted(strays))}"]
    return weight_map, []


def _safe_shard_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name == os.path.basename(name)
        and len(name) <= 255
        and not any(c in name for c in "/\\\0:")
        and name.isprintable()
    )


def _shards_in(root: Path) -> set[str]:
    return {entry.name for entry in os.scandir(root) if entry.name.endswith(".safetensors")}


def _only_shard(root: Path) -> str:
    shards = sorted(name for name in _shards_in(root) if not _is_other_index(name))
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise CheckpointError(
            f"{INDEX}: is missing, and the folder holds {len(shards)} .safetensors files "
            f"({show_some(shards)}); download the index"
        )
    others = sorted(
        e.name for e in os.scandir(root) if Path(e.name).suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    found = f"only {show_some(others)}" if others else "no weights"
    raise CheckpointError(
        f"{show(root)}: has no .safetensors files, {found}; moe-ckpt reads safetensors"
    )


def _compare_with_index(weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    problems = Problems()
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None:
            problems.add(
                CheckpointError, f"{INDEX}: {show(name)}: is not in {shard}; download it again"
            )
        elif info.shard != shard:
            problems.add(
                CheckpointError, f"{INDEX}: {show(name)}: is in {info.shard}, not in {shard}"
            )
    problems.check()
    unlisted = [name for name in tensors if name not in weight_map]
    if not unlisted:
        return []
    return [f"carried over, though the index does not name it: {show_some(unlisted)}"]


def _side_files(root: Path, shards: set[str]) -> tuple[list[SideFile], list[str], list[str]]:
    """Files to copy, names left out by rule, and warnings about those left out for safety."""
    real_root = Path(os.path.realpath(root))
    # In a hub cache, snapshots/REV/FILE is a link to ../../blobs/HASH.
    allowed = (real_root, real_root.parent.parent / "blobs")
    files: list[SideFile] = []
    left_out = ["original/"] if (root / "original").is_dir() else []
    warnings: list[str] = []
    for path in sorted(_walk(root)):
        name = path.relative_to(root).as_posix()
        if name in shards or name in _REWRITTEN:
            continue
        if path.suffix in _OTHER_WEIGHTS or _is_other_index(path.name):
            left_out.append(name)
            continue
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not any(target.is_relative_to(folder) for folder in allowed):
            warnings.append(f"left out, it links outside the checkpoint: {show(name)}")
        elif not target.is_file():
            warnings.append(f"left out, it is not a regular file: {show(name)}")
        else:
            files.append(SideFile(name, path, target.stat().st_size))
    return files, left_out, warnings


def _is_other_index(name: str) -> bool:
    return name.startswith("consolidated") or name.endswith(
        (".safetensors.index.json", ".bin.index.json")
    )


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        if Path(folder) == root:
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            yield Path(folder, name)
        for name in subfolders:
            if Path(folder, name).is_symlink():
                yield Path(folder, name)
