"""Open files of strangers: only regular ones, without blocking on a FIFO or a device."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from ..errors import EnvironmentFaultError, InputError, MoeCkptError, show

__all__ = ["changed", "file_sha256", "impostor", "open_planned", "open_regular", "read_failure"]
__all__ += ["read_regular"]

# What a folder can be made to answer. All other errors are the machine's: a disk or a network
# that fails, permissions, too many open files.
_BAD_PATHS = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
)
_NOT_OPENED = frozenset((errno.ENXIO, errno.ENODEV))  # sockets and devices without a driver
_MORE_NBYTES = 1 << 16
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_IMPOSTORS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file; run `git lfs pull`"),
    (b"<!doctype html", "is an HTML page, not the file; download it again"),
    (b"<html", "is an HTML page, not the file; download it again"),
    (b"pk\3\4", "is a zip file, as torch.save writes them, and is never opened; use safetensors"),
    (b"gguf", "is a GGUF file; moe-ckpt reads safetensors"),
)
_PICKLES = tuple(bytes((0x80, version)) for version in range(2, 6))


def impostor(start: bytes) -> str:
    """What a file with this start is, if it is often found in the place of another; else ''.

    >>> impostor(b"<!DOCTYPE html><html>")
    'is an HTML page, not the file; download it again'
    """
    if start.startswith(_PICKLES):
        return "is a Python pickle, which can run code and is never opened; use safetensors"
    start = start[:64].lstrip().lower()
    return next((text for magic, text in _IMPOSTORS if start.startswith(magic)), "")


def read_failure(error: OSError, name: str, kind: type[InputError]) -> MoeCkptError:
    """What a failure to read ``name`` means: bad input, of class ``kind``, or a fault to mend."""
    if error.errno in _BAD_PATHS:
        return kind(f"{show(name)}: cannot be opened: {error.strerror}")
    if error.errno in _NOT_OPENED:
        return kind(f"{show(name)}: is not a regular file; put the file itself there")
    return EnvironmentFaultError(
        f"{show(name)}: cannot be read: {error.strerror or show(error)}; mend this and run again"
    )


def open_regular(path: Path, kind: type[InputError]) -> tuple[int, os.stat_result]:
    """A file descriptor to close, and the file's status; symbolic links are followed.

    Raises:
        InputError: of class ``kind``; there is no such file, or it is none.
        EnvironmentFaultError: the machine failed to open it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise kind(
                f"{show(path.name)}: links to {show(os.readlink(path))}, which is not there; "
                "download it again"
            ) from None
        raise kind(f"{show(path.name)}: No such file or directory: {show(path)}") from None
    except OSError as error:
        raise read_failure(error, path.name, kind) from None
    except ValueError as error:  # a NUL in the path
        raise kind(f"{show(path.name)}: cannot be opened: {show(error)}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        what = next((name for is_it, name in _KINDS if is_it(status.st_mode)), "something else")
        raise kind(f"{show(path.name)}: is {what}, not a regular file; put the file itself there")
    return fd, status


def open_planned(path: Path, name: str, nbytes: int, mtime_ns: int) -> int:
    """A file descriptor to close of a file that a plan was made with.

    Raises:
        EnvironmentFaultError: it is no longer the file of this size and modification time.
        OSError: the machine failed to open it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    found = (stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime_ns)
    if found != (True, nbytes, mtime_ns):
        os.close(fd)
        raise changed(name)
    return fd


def changed(name: str) -> EnvironmentFaultError:
    """What to say of a file that is no longer what it was planned with."""
    return EnvironmentFaultError(
        f"{show(name)}: changed while it was read; run again when the checkpoint is complete"
    )


def read_regular(path: Path, cap_nbytes: int, kind: type[InputError]) -> bytes:
    """The bytes of a regular file of at most ``cap_nbytes``."""
    fd, status = open_regular(path, kind)
    nbytes = status.st_size
    try:
        with os.fdopen(fd, "rb") as file:
            found = [file.read(nbytes)] if nbytes <= cap_nbytes else []
            while nbytes <= cap_nbytes and (more := file.read(_MORE_NBYTES)):
                found.append(more)  # it grows, or the kernel makes it up and says that it is empty
                nbytes += len(more)
    except OSError as error:
        raise read_failure(error, path.name, kind) from None
    if nbytes > cap_nbytes:
        raise kind(
            f"{show(path.name)}: is {nbytes} bytes, more than the {cap_nbytes} allowed; it cannot "
            "be what its name says"
        )
    return b"".join(found)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as a hub and `sha256sum` show it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
