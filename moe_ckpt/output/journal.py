"""The journal of a conversion: what it is made from, and which files are finished.

``.moe-ckpt/journal.jsonl`` in the output folder has a JSON object on each line:

    {"schema": "moe-ckpt/journal", "version": 1, "plan": "5e0c...", "content": null, "origin": ...}
    {"file": "model-00001-of-00006.safetensors", "nbytes": 4999991296, "sha256": "9f2c..."}

The first says what is converted, and how. The others are finished files: a line is on disk before
its file gets its name, so a file that has its name and no line is somebody else's. A last line
without an end was being written when the machine stopped, and counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import EnvironmentFaultError, InputError, OutputRefusedError, show
from ..plan import Plan
from ..source.files import read_regular
from ..source.strict_json import parse_object
from .durable import replace, sync_folder, write_new

__all__ = ["JOURNAL", "PRIVATE", "Head", "Journal", "JournalWriter", "Record", "head_of"]
__all__ += ["read_journal"]

PRIVATE = ".moe-ckpt"  # everything that no runtime should see
JOURNAL = f"{PRIVATE}/journal.jsonl"
SCHEMA, VERSION = "moe-ckpt/journal", 1
_CAP_NBYTES = 100_000_000
_REMEDY = "it cannot be told what here is moe-ckpt's: remove the folder or choose another"


class Record(NamedTuple):
    """A finished file, with its name below the output folder.

    ``inexact_blocks``: blocks of MXFP4 in it that NVFP4 could not hold exactly.
    """

    file: str
    nbytes: int
    sha256: str
    inexact_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """What is converted, and how.

    ``plan``: the digest of the plan. ``content``: shard of the source -> its SHA-256, if that was
    asked for. ``origin``: what the plan was made from.
    """

    plan: str
    content: Mapping[str, str] | None
    origin: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal as it was read; of several lines for a file the last counts."""

    head: Head
    records: Mapping[str, Record]


def head_of(plan: Plan, content: Mapping[str, str] | None = None) -> Head:
    """The first line for a plan."""
    return Head(plan.digest(), content, plan.origin.document())


def read_journal(out_dir: Path) -> Journal | None:
    """The journal of an output folder; None if there is none.

    Raises:
        OutputRefusedError: it is damaged, or of another version.
    """
    path = out_dir / JOURNAL
    if not os.path.lexists(path):
        return None
    name = show(path)
    try:
        lines = read_regular(path, _CAP_NBYTES, InputError).split(b"\n")[:-1]
        rows = [parse_object(line, name, InputError, remedy=_REMEDY) for line in lines]
        if not rows or (rows[0].get("schema"), rows[0].get("version")) != (SCHEMA, VERSION):
            raise InputError(f"{name}: is not a journal of version {VERSION}; {_REMEDY}")
        head = Head(**{key: rows[0][key] for key in Head.__slots__})
        records = [Record(**row) for row in rows[1:]]
        if any(map(_is_unsound, records)) or not _is_origin(head.origin):
            raise InputError(f"{name}: a line has values of wrong types; {_REMEDY}")
    except InputError as error:
        raise OutputRefusedError(*error.problems) from None
    except (TypeError, KeyError):
        raise OutputRefusedError(f"{name}: a line has other keys; {_REMEDY}") from None
    return Journal(head, {record.file: record for record in records})


class JournalWriter:
    """The journal of a conversion that runs; it adds to ``records`` as it does to the file.

    The file is ours alone: whoever removes or replaces it is noticed, and nothing is lost by it.
    """

    def __init__(self, out_dir: Path, token: str, head: Head, records: dict[str, Record]) -> None:
        self.records = records
        self._lock = Lock()
        self._path = out_dir / JOURNAL
        self._token = token
        first = {"schema": SCHEMA, "version": VERSION}
        first |= {key: getattr(head, key) for key in Head.__slots__}
        self._first = _line(first)
        self.settle(list(records))

    def add(self, record: Record) -> None:
        """Put a line on disk; several threads may.

        Raises:
            EnvironmentFaultError: as `check`.
        """
        self.check()
        with self._lock, open(self._path, "ab", opener=_existing) as file:
            file.write(_line(_row(record)))
            file.flush()
            os.fsync(file.fileno())
            self.records[record.file] = record

    def take_back(self, name: str) -> None:
        """Record a file no longer."""
        with self._lock:
            self.settle([other for other in self.records if other != name])

    def check(self) -> None:
        """See that the journal is still there.

        Raises:
            EnvironmentFaultError: it is not; it has been written anew.
        """
        with self._lock:
            if self._is_there():
                return
            self._write_anew()
        raise EnvironmentFaultError(
            f"{show(self._path)}: was removed or changed while the conversion ran; nothing that is "
            "finished is lost, run the same command again"
        )

    def restore(self) -> None:
        """Write a journal that is gone anew, of the files that are still there."""
        with self._lock:
            if not self._is_there():
                self._write_anew()

    def _is_there(self) -> bool:
        try:
            with open(self._path, "rb", opener=_without_waiting) as file:
                return file.read(len(self._first)) == self._first
        except OSError:
            return False

    def _write_anew(self) -> None:
        root = self._path.parent.parent
        with suppress(OutputRefusedError):
            if read_journal(root):
                return  # another conversion's, which no lock kept out
        kept = [name for name in self.records if os.path.lexists(root / name)]
        if kept:
            self._path.parent.mkdir(exist_ok=True)
            self.settle(kept)
        else:
            self.records.clear()

    def settle(self, order: Iterable[str]) -> None:
        """Write the journal anew: a line for each of these files, in this order."""
        kept = [self.records[name] for name in order]
        self.records.clear()
        self.records.update((record.file, record) for record in kept)
        partial = self._path.with_name(f"journal.{self._token}.partial")
        write_new(partial, [self._first, *(_line(_row(r)) for r in self.records.values())])
        replace(partial, self._path)
        sync_folder(self._path.parent.parent)


def _existing(path: str, flags: int) -> int:
    """Open a journal that is there: a new one would begin without its first line."""
    return os.open(path, flags & ~os.O_CREAT)


def _without_waiting(path: str, flags: int) -> int:
    """Open what stands at the place of the journal, even if it is a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def _row(record: Record) -> dict[str, Any]:
    row = record._asdict()
    if not record.inexact_blocks:
        del row["inexact_blocks"]
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _is_unsound(record: Record) -> bool:
    texts = isinstance(record.file, str) and isinstance(record.sha256, str)
    if not texts or type(record.nbytes) is not int or type(record.inexact_blocks) is not int:
        return True
    parts = record.file.split("/")  # a name that leads out of the folder would be removed there
    return "" in parts or "." in parts or ".." in parts or "\0" in record.file


def _is_origin(origin: object) -> bool:
    """Whether a JSON value has what `origin.differences` looks at."""
    texts = {"version", "headers", "config", "mtimes"}
    if not isinstance(origin, dict) or not texts <= origin.keys():
        return False
    return all(isinstance(origin.get(key), dict) for key in ("options", "files"))
