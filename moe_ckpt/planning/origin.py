"""What a plan was made from: the source, the options, other files, and the version of moe-ckpt.

A conversion that is taken up again must agree in all of it, or shards of two kinds would stand
side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..formats import DEFAULT_FORMAT
from ..source.checkpoint import Source
from .options import Options, parse_size

__all__ = ["Origin", "differences", "file_sha256", "origin_of"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What decides the bytes of an output, beside the source's own bytes.

    ``headers``: digest over the source's files, their sizes and the headers of shards; ``config``:
    over its config.json; ``mtimes``: over the modification times of its shards. ``options``: those
    that decide a byte. ``files``: option -> SHA-256 of the files given with it.
    """

    version: str
    headers: str
    config: str
    mtimes: str
    options: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self)
        found["files"] = {option: list(digests) for option, digests in self.files.items()}
        return found


def origin_of(options: Options, source: Source) -> Origin:
    """What a plan with these options is made from."""
    from .. import __version__

    headers, mtimes = hashlib.sha256(), hashlib.sha256()
    for shard in source.shards.values():
        headers.update(_bytes(f"{shard.name} {shard.nbytes}\n"))
        mtimes.update(_bytes(f"{shard.name} {shard.mtime_ns}\n"))
    for file in source.side_files:
        headers.update(_bytes(f"{file.name} {file.nbytes}\n"))
    for info in source.tensors.values():
        headers.update(_bytes(f"{info.name} {info.dtype} {info.shape} {info.offset}\n"))
    is_recipe = options.recipe is not None
    chosen = {
        "--format": "" if is_recipe else options.format or DEFAULT_FORMAT,
        "--quantize": "" if is_recipe else options.quantize or "experts",
        "--dialect": options.dialect or "",
        "--kv-cache": options.kv_cache,
        "--experts": options.experts,
        "--layout": options.layout or "",
        "--gate-up-order": options.gate_up_order or "",
        "--max-shard-size": str(parse_size(options.max_shard_size)),
        "--missing-stats": options.missing_stats,
    }
    given = {
        "--stats": options.stats_files,
        "--recipe": _paths(options.recipe),
        "--weight-amax": _paths(options.weight_amax),
    }
    files = {option: tuple(sorted(map(file_sha256, paths))) for option, paths in given.items()}
    config = hashlib.sha256(json.dumps(source.config).encode())
    return Origin(
        version=__version__,
        headers=headers.hexdigest(),
        config=config.hexdigest(),
        mtimes=mtimes.hexdigest(),
        options=chosen,
        files=files,
    )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, of_mtimes: str = ""
) -> Iterator[str]:
    """What differs between two origins as JSON has them, in words.

    ``of_mtimes`` is added where modification times do.
    """
    if before["version"] != now["version"]:
        yield f"moe-ckpt {before['version']} began it, this is {now['version']}"
    if before["headers"] != now["headers"]:
        yield "the source has other files, sizes or headers"
    elif before["config"] != now["config"]:
        yield "the source's config.json says other things"
    elif before["mtimes"] != now["mtimes"]:
        yield f"files of the source were written since{of_mtimes}"
    for option, value in now["options"].items():
        was = before["options"].get(option)
        if was != value:
            yield f"{option} was {was or 'not given'} and is {value or 'not given'} now"
    for option, digests in now["files"].items():
        was = before["files"].get(option)
        if was and digests and was != digests:
            yield f"{option} has another content"
        elif was != digests:
            yield f"{option} {'was given before' if was else 'is given now'} only"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as a hub and `sha256sum` show it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # file names need not be Unicode


def _paths(file: str | os.PathLike[str] | None) -> Iterable[str]:
    return () if file is None else (os.fspath(file),)
