"""Whether the files of a conversion of ours are still those that it published."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ...errors import show
from ...output.journal import Record
from ...source.files import file_sha256
from ..findings import Findings
from ..subject import Subject

__all__ = ["check_digests"]

_EFFECT = "it is not what the conversion wrote: its bytes rotted, or somebody changed them"
_MOST_THREADS = 8


def check_digests(subject: Subject, findings: Findings, *, read_all: bool) -> None:
    """Compare sizes with the journal, and SHA-256 as well if ``read_all``."""
    if subject.journal is None:
        return
    records = list(subject.journal.records.values())
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        problems = pool.map(partial(_problem, subject.root, read_all), records)
        for record, problem in zip(records, problems, strict=True):
            if problem:
                findings.add("structure", show(record.file), problem, _EFFECT)
    if read_all:
        findings.counts["digests"] += len(records)


def _problem(root: Path, read_all: bool, record: Record) -> str:
    """What is wrong with a published file; '' if nothing is."""
    path = root / record.file
    if not path.is_file():
        return "is missing; the conversion published it"
    nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        return f"has {nbytes} bytes; the conversion published {record.nbytes}"
    found = file_sha256(path) if read_all else record.sha256
    if found != record.sha256:
        return f"has SHA-256 {found}; the conversion published {show(record.sha256)}"
    return ""
