"""A checkpoint folder, read without its weights: headers, index, config and side files.

Headers, index and config must agree with each other; which files are copied beside the weights
is decided here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..dialects.config import CONFIG, HF_QUANT_CONFIG
from ..errors import CheckpointError, Problems, show, show_some
from .files import changed, open_planned, open_regular, read_failure, read_regular
from .headers import Shard, TensorInfo, read_header
from .nested import nested_checkpoints
from .strict_json import parse_object, show_value, type_name

__all__ = ["SideFile", "Source", "is_safe_shard_name", "missing_of", "open_side_file"]
__all__ += ["open_source", "pieces_of", "shards_in"]

# What runtimes look for in a folder, in the source and in the output alike.
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RECIPE_FILE = "moe-ckpt-recipe.toml"  # in our output: what each module became
_CONFIG_CAP_NBYTES = 30_000_000
_INDEX_CAP_NBYTES = 100_000_000
_PIECE_NBYTES = 4 << 20

# What PEFT calls the weights of an adapter, and what to do with one.
_ADAPTER = re.compile(r"adapter_model[^/]*\.(safetensors|bin)")
MERGE = (
    "merge it into the model first: load both with peft, call merge_and_unload() and "
    "save_pretrained() of the result, and convert that"
)

# Weights in other formats: runtimes would find them beside ours, and pickles can run code.
_OTHER_WEIGHTS = (
    ".bin .ckpt .gguf .h5 .mlmodel .msgpack .npy .npz .onnx .ot .pickle .pkl .pt .pth .safetensors"
).split()
_SKIPPED_FOLDERS = {".cache", ".git", ".moe-ckpt", "original"}
_REWRITTEN = {CONFIG, INDEX, HF_QUANT_CONFIG, RECIPE_FILE}

_NUMBERED = re.compile(r"(.+-)([0-9]{1,6})(-of-)([0-9]{1,6})(\.safetensors)")


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file copied as it is; ``name`` is its path relative to the checkpoint, ``/`` separated.

    It was opened, and was a regular file of this size and modification time.
    """

    name: str
    path: Path
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint whose headers, index and config agree with each other.

    ``strays``: shards beside those of the index, which it does not name. They are among
    ``left_out``, which names files and, with a ``/`` at the end, folders that are not copied.
    """

    root: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    strays: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_source(folder: str | os.PathLike[str]) -> Source:
    """Read everything but the weights of a checkpoint folder.

    Raises:
        CheckpointError: with every damaged, missing or contradictory file that was found.
        EnvironmentFaultError: the disk failed.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise CheckpointError(
            f"{show(root)}: is not a folder with a checkpoint; give the one that holds config.json"
        )
    try:
        return _open_source(root)
    except OSError as error:
        raise read_failure(error, error.filename or str(root), CheckpointError) from None


def _open_source(root: Path) -> Source:
    _refuse_adapter(root)
    if not os.path.lexists(root / CONFIG):
        raise CheckpointError(
            f"{CONFIG}: is missing in {show(root)}; download it, or give the folder that holds it"
        )
    config = parse_object(
        read_regular(root / CONFIG, _CONFIG_CAP_NBYTES, CheckpointError),
        CONFIG,
        CheckpointError,
        constants=True,  # transformers writes Infinity, e.g. for time_step_limit
    )
    weight_map, strays = _find_shards(root)
    problems = Problems()
    shards: dict[str, Shard] = {}
    tensors: dict[str, TensorInfo] = {}
    stale: dict[str, TensorInfo] = {}
    present = shards_in(root)
    for name in sorted(set(weight_map.values())) if weight_map else _without_index(root):
        if name not in present:
            problems.add(
                CheckpointError, f"{name}: shard is missing; download the checkpoint again"
            )
            continue
        read = problems.catch(partial(read_header, root / name))
        if read is None:
            continue
        shards[name], found = read
        for info in found:
            if weight_map.get(info.name, name) != name:
                stale[info.name] = info
                continue
            if info.name in tensors:
                problems.add(CheckpointError, _in_two_shards(tensors[info.name], info, weight_map))
            tensors[info.name] = info
    problems.check()
    warnings = _compare_with_index(weight_map, tensors, stale) if weight_map else []
    side_files, left_out, more = _side_files(root, set(shards))
    return Source(
        root=root,
        config=config,
        shards=shards,
        tensors=tensors,
        side_files=tuple(side_files),
        left_out=tuple(left_out),
        warnings=(*warnings, *more),
        strays=tuple(strays),
    )


def _refuse_adapter(root: Path) -> None:
    """Refuse an adapter without its model, and one that stands beside a model."""
    if not (root / ADAPTER_CONFIG).exists():
        return
    if not (root / CONFIG).exists():
        raise CheckpointError(
            f"{ADAPTER_CONFIG}: this is a LoRA adapter without its model; {MERGE}"
        )
    weights = sorted(entry.name for entry in os.scandir(root) if _ADAPTER.fullmatch(entry.name))
    if weights:
        raise CheckpointError(
            f"{show_some(weights)}: is an adapter, such as LoRA, beside the model that it changes; "
            f"{MERGE}. If these weights have it in them already, remove it and {ADAPTER_CONFIG}"
        )


def _find_shards(root: Path) -> tuple[dict[str, str], list[str]]:
    """The weight_map of the index ({} if there is none), and the shards that it does not name."""
    if not os.path.lexists(root / INDEX):
        return {}, []
    index = parse_object(
        read_regular(root / INDEX, _INDEX_CAP_NBYTES, CheckpointError), INDEX, CheckpointError
    )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{INDEX}: "weight_map" must be an object that names each tensor\'s shard, found '
            f"{type_name(weight_map) if weight_map != {} else 'an empty one'}; download it again"
        )
    problems = Problems()
    names = {shard for shard in weight_map.values() if isinstance(shard, str)}
    safe = {name for name in names if is_safe_shard_name(name)}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in safe:
            problems.add(
                CheckpointError,
                f'{INDEX}: weight_map["{show(tensor)}"] is {show_value(shard)}; expected the '
                "plain name of a .safetensors file in the same folder",
            )
    problems.check()
    strays = shards_in(root) - names
    if SINGLE in strays:
        raise CheckpointError(
            f"{SINGLE}: stands beside {INDEX}, which does not name it; runtimes disagree on which "
            "to read. Remove the stale one"
        )
    return weight_map, sorted(strays)


def is_safe_shard_name(name: str) -> bool:
    """Whether a name from an index is that of a file in the same folder."""
    return (
        name.endswith(".safetensors")
        and name == os.path.basename(name)
        and len(name) <= 255
        and not any(c in name for c in "/\\\0:")
        and name.isprintable()
    )


def shards_in(root: Path) -> set[str]:
    """Names of all .safetensors files in a folder."""
    return {entry.name for entry in os.scandir(root) if entry.name.endswith(".safetensors")}


def missing_of(names: Iterable[str]) -> list[str]:
    """The shards that must be there by the ``-of-N`` in the names of others, and are not.

    >>> missing_of(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
    ['model-00002-of-00003.safetensors']
    """
    there = set(names)
    counted: dict[tuple[str, ...], str] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, sorted(there))):
        counted.setdefault((match[1], match[3], match[4], match[5]), match[2])
    return [
        name
        for (stem, of, count, ending), number in counted.items()
        for n in range(1, int(count) + 1)
        if (name := f"{stem}{n:0{len(number)}d}{of}{count}{ending}") not in there
    ]


def _without_index(root: Path) -> list[str]:
    """The shards of a folder without an index: all, as vLLM and SGLang read them."""
    shards = sorted(name for name in shards_in(root) if not _is_other_index(name))
    if missing := missing_of(shards):
        raise CheckpointError(
            f"{show_some(missing)}: shard is missing, for others are named as of so many; "
            "download it"
        )
    if shards:
        return shards
    others = sorted(
        e.name for e in os.scandir(root) if Path(e.name).suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    found = f"only {show_some(others)}" if others else "no weights"
    raise CheckpointError(
        f"{show(root)}: has no .safetensors files, {found}; moe-ckpt reads safetensors, download "
        "those"
    )


def _in_two_shards(one: TensorInfo, other: TensorInfo, weight_map: Mapping[str, str]) -> str:
    """Why a tensor is refused of which no index says which shard counts."""
    if weight_map:
        what = f"{INDEX} names neither; name the one that counts there"
    else:
        what = (
            f'there is no {INDEX} to say which counts; write one, with "weight_map", tensor -> '
            "shard, or move the shard that does not belong here to another folder"
        )
    return f"{show(one.name)}: is in two shards, {one.shard} and {other.shard}, and {what}"


def _compare_with_index(
    weight_map: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    stale: Mapping[str, TensorInfo],
) -> list[str]:
    """What to warn of; ``stale`` are tensors in another shard than the index names."""
    problems = Problems()
    for name, shard in weight_map.items():
        if name in tensors:
            continue
        if name in stale:
            problems.add(
                CheckpointError,
                f"{INDEX}: {show(name)}: is in {stale[name].shard}, not in {shard}; download the "
                "index and both again",
            )
        else:
            problems.add(
                CheckpointError, f"{INDEX}: {show(name)}: is not in {shard}; download it again"
            )
    problems.check()
    warnings = []
    if stale:
        copies = [f"{name} in {info.shard}" for name, info in stale.items()]
        warnings.append(
            f"left out, for the index names another shard that has it: {show_some(copies)}"
        )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        warnings.append(f"carried over, though the index does not name it: {show_some(unlisted)}")
    return warnings


def _side_files(root: Path, shards: set[str]) -> tuple[list[SideFile], list[str], list[str]]:
    """Files to copy, names left out by rule, and warnings about those left out for safety."""
    files: list[SideFile] = []
    left_out = ["original/"] if (root / "original").is_dir() else []
    warnings: list[str] = []
    paths = {path.relative_to(root).as_posix(): path for path in sorted(_walk(root))}
    nested = dict(nested_checkpoints(paths, _OTHER_WEIGHTS[:-1]))
    for name, path in paths.items():
        if name in shards or name in _REWRITTEN:
            continue
        folder = next((folder for folder in nested if name.startswith(f"{folder}/")), "")
        is_weights = path.suffix in _OTHER_WEIGHTS or _is_other_index(path.name)
        if (is_weights and not folder) or name == ADAPTER_CONFIG:
            left_out.append(name)
            continue
        if _leads_out(root, path):
            warnings.append(f"left out, it links outside the checkpoint: {show(name)}")
        elif not path.is_file():
            warnings.append(f"left out, it is not a regular file: {show(name)}")
        else:
            fd, status = open_regular(path, CheckpointError)
            os.close(fd)
            files.append(SideFile(name, path, status.st_size, status.st_mtime_ns))
            continue
        nested[folder] = False
    halves = [f"{folder}/" for folder, is_whole in nested.items() if folder and not is_whole]
    files = [file for file in files if not file.name.startswith((*halves,))]
    return files, left_out + halves, warnings


def open_side_file(root: Path, file: SideFile) -> int:
    """A file descriptor to close of a file of the checkpoint ``root``.

    Raises:
        EnvironmentFaultError: it is no longer the file that was planned with, or a link leads out.
        OSError: the machine failed to open it.
    """
    if _leads_out(root, file.path):
        raise changed(file.name)
    return open_planned(file.path, file.name, file.nbytes, file.mtime_ns)


def pieces_of(root: Path, file: SideFile) -> Iterator[bytes]:
    """The bytes of a side file; errors as of `open_side_file`, at the end as well."""
    nbytes = 0
    with open(open_side_file(root, file), "rb") as opened:
        while nbytes <= file.nbytes and (piece := opened.read(_PIECE_NBYTES)):
            nbytes += len(piece)
            yield piece
        if (nbytes, os.fstat(opened.fileno()).st_mtime_ns) != (file.nbytes, file.mtime_ns):
            raise changed(file.name)


def _leads_out(root: Path, path: Path) -> bool:
    """Whether a path in a checkpoint is that of something elsewhere.

    In a hub cache, snapshots/REV/FILE is a link to ../../blobs/HASH.
    """
    there = Path(os.path.realpath(root))
    target = Path(os.path.realpath(path))
    return not any(target.is_relative_to(f) for f in (there, there.parent.parent / "blobs"))


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
