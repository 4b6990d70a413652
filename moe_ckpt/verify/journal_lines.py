"""What the journal of a conversion says of the files that it published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..regular import read_regular

__all__ = ["Journal", "Published", "read_journal"]

JOURNAL = ".moe-ckpt/journal.jsonl"
_SCHEMA = "moe-ckpt/journal"
_CAP_NBYTES = 100_000_000


class Published(NamedTuple):
    """Size and SHA-256, in hexadecimal, of a file when it was published."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Journal:
    """The files of a conversion, by name."""

    files: Mapping[str, Published]


def read_journal(root: Path) -> Journal | None:
    """The journal in a folder; None if there is none that can be read."""
    try:
        text = read_regular(root / JOURNAL, _CAP_NBYTES, InputError)
    except InputError:
        return None
    lines = [line for line in map(_object, text.split(b"\n")) if line is not None]
    if not lines or lines[0].get("schema") != _SCHEMA:
        return None
    files: dict[str, Published] = {}
    for line in lines[1:]:
        name, nbytes, sha256 = line.get("file"), line.get("nbytes"), line.get("sha256")
        if isinstance(name, str) and isinstance(nbytes, int) and isinstance(sha256, str):
            files[name] = Published(nbytes, sha256)
    return Journal(files)


def _object(line: bytes) -> dict[str, object] | None:
    """An object on a line; a line that was cut short is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
