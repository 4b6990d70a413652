"""What a plan is made from, as digests."""

from __future__ import annotations

import hashlib
import json

from ..origin import Origin
from ..source.checkpoint import Source
from ..source.files import file_sha256
from ..version import __version__
from .options import Options

__all__ = ["origin_of"]


def origin_of(options: Options, source: Source) -> Origin:
    """What a plan with these options is made from."""
    headers, mtimes = hashlib.sha256(), hashlib.sha256()
    for shard in source.shards.values():
        headers.update(_bytes(f"{shard.name} {shard.nbytes}\n"))
        mtimes.update(_bytes(f"{shard.name} {shard.mtime_ns}\n"))
    for file in source.side_files:
        headers.update(_bytes(f"{file.name} {file.nbytes}\n"))
        mtimes.update(_bytes(f"{file.name} {file.mtime_ns}\n"))
    for info in source.tensors.values():
        headers.update(_bytes(f"{info.name} {info.dtype} {info.shape} {info.offset}\n"))
    config = hashlib.sha256(json.dumps(source.config).encode())
    return Origin(
        version=__version__,
        headers=headers.hexdigest(),
        config=config.hexdigest(),
        mtimes=mtimes.hexdigest(),
        options=options.decisions,
        files={
            flag: tuple(sorted(map(file_sha256, paths))) for flag, paths in options.files.items()
        },
    )


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # file names need not be Unicode
