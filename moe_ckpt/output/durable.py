"""Give a complete file its name, so that a power cut leaves it whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["publish", "replace", "sync_folder", "write_new"]

# Where a file system has no second names for a file, or not in another of its folders.
_NO_LINKS = (
    *(errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),
    *(errno.EINVAL, errno.EMLINK),
)


def write_new(path: Path, pieces: Iterable[bytes]) -> tuple[int, str]:
    """Write a file that is not there yet, to the disk; returns its bytes and its SHA-256."""
    nbytes, state = 0, hashlib.sha256()
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            state.update(piece)
            nbytes += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return nbytes, state.hexdigest()


def publish(partial: Path, final: Path) -> None:
    """Rename a file that is on disk already, and make the rename durable.

    A rename replaces what has the name; to add a name and take the other away does not.

    Raises:
        FileExistsError: something has the name.
    """
    try:
        os.link(partial, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        replace(partial, final)
        return
    sync_folder(final.parent)
    os.unlink(partial)


def replace(partial: Path, final: Path) -> None:
    """The same, in the place of what has the name."""
    os.replace(partial, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, where that can be asked for."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # one may write in a folder that one may not read
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems
            raise
    finally:
        os.close(fd)
