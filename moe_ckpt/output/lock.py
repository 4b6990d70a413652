"""One conversion at a time in an output folder.

The lock is the system's, so that of a process that died is free. Where a file system has none,
or forgets it, two conversions spoil nothing: they write the same bytes under names of their own
before each file gets its place.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InputError, OutputRefusedError, show
from ..source.files import read_regular
from ..source.strict_json import parse_object

__all__ = ["LOCK", "OWNER", "locked"]

LOCK, OWNER = "lock", "owner.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_CAP_NBYTES = 10_000


@contextmanager
def locked(private: Path) -> Iterator[None]:
    """Hold the lock of an output folder; ``private`` is the folder in it that is ours.

    Raises:
        OutputRefusedError: another process holds it; the message names process and host.
    """
    lock = FileLock(private / LOCK, timeout=0)
    is_held = _acquire(lock, private)
    owner = private / OWNER
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        owner.write_text(json.dumps(who) + "\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        if is_held:
            with suppress(OSError):  # before it is released: who waits for it looks again
                (private / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                lock.release()


def _acquire(lock: FileLock, private: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes a file's existence for a lock instead
            lock.acquire()
    except Timeout:
        raise OutputRefusedError(
            f"{show(private.parent)}: is in use by {_owner(private)}; wait for it, or choose "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _owner(private: Path) -> str:
    """Who holds the lock, in words."""
    try:
        text = read_regular(private / OWNER, _CAP_NBYTES, InputError)
        who = parse_object(text, OWNER, InputError)
    except InputError:
        return "another moe-ckpt"
    return (
        f"process {show(who.get('pid'))} on host {show(who.get('host'))} since "
        f"{show(who.get('started'))}"
    )
