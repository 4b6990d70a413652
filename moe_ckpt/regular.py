"""Open files of strangers: only regular ones, without blocking on a FIFO or a device."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import InputError, show

__all__ = ["open_regular", "read_regular"]


def open_regular(path: Path, kind: type[InputError]) -> tuple[int, os.stat_result]:
    """A file descriptor to close, and the file's status; symbolic links are followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise kind(f"{show(path.name)}: No such file or directory: {show(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise kind(f"{show(path.name)}: cannot be opened: {show(reason)}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise kind(f"{show(path.name)}: is not a regular file")
    return fd, status


def read_regular(path: Path, cap_nbytes: int, kind: type[InputError]) -> bytes:
    """The bytes of a regular file of at most ``cap_nbytes``."""
    fd, status = open_regular(path, kind)
    with os.fdopen(fd, "rb") as file:
        if status.st_size > cap_nbytes:
            raise kind(
                f"{show(path.name)}: is {status.st_size} bytes, more than the {cap_nbytes} allowed"
            )
        return file.read()
