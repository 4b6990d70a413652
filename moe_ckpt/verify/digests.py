"""Whether the files of a conversion of ours are still those that it published."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import show
from .findings import Findings
from .subject import Subject

__all__ = ["check_digests"]

_CHUNK_NBYTES = 1 << 20
_EFFECT = "it is not what the conversion wrote: its bytes rotted, or somebody changed them"


def check_digests(subject: Subject, findings: Findings, *, read_all: bool) -> None:
    """Compare sizes with the journal, and SHA-256 as well if ``read_all``."""
    if subject.journal is None:
        return
    for name, published in subject.journal.records.items():
        path = subject.root / name
        if not path.is_file():
            findings.add(
                "structure", show(name), "is missing; the conversion published it", _EFFECT
            )
            continue
        nbytes = path.stat().st_size
        if nbytes != published.nbytes:
            findings.add(
                "structure",
                show(name),
                f"has {nbytes} bytes; the conversion published {published.nbytes}",
                _EFFECT,
            )
        elif read_all:
            findings.counts["digests"] += 1
            found = _sha256(path)
            if found != published.sha256:
                findings.add(
                    "structure",
                    show(name),
                    f"has SHA-256 {found}; the conversion published {show(published.sha256)}",
                    _EFFECT,
                )


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            state.update(chunk)
    return state.hexdigest()
