"""Give a complete file its name, so that a power cut leaves it whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["publish", "sync_folder"]


def publish(partial: Path, final: Path) -> None:
    """Rename a file that is on disk already, and make the rename durable."""
    partial.replace(final)
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
