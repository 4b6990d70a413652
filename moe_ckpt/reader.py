"""Read byte ranges of source shards with pread, never through a mapping.

Pages of a mapping count as memory of the process, and a file cut short under it kills the
process without a message.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock

from .errors import EnvironmentFaultError, show
from .headers import Shard
from .plan import Read

__all__ = ["SourceReader"]


class SourceReader:
    """Open shards of a source, to be read by several threads."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = {shard.name: shard for shard in shards}
        self._fds: dict[str, int] = {}
        self._lock = Lock()

    def read(self, read: Read, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of ``read`` from its byte ``start`` on."""
        fd = self._fd(read.shard)
        position = read.offset + start
        filled = 0
        while filled < len(into):
            try:
                count = os.preadv(fd, [into[filled:]], position + filled)
            except OSError as error:
                path = str(self._shards[read.shard].path)
                raise OSError(error.errno, error.strerror, path) from error
            if count == 0:
                raise _changed(read.shard)
            filled += count

    def forget(self, read: Read) -> None:
        """Let the system drop these bytes from its cache: they are not read again.

        A terabyte that passes through it would drive out everything else.
        """
        with suppress(OSError):
            os.posix_fadvise(self._fd(read.shard), read.offset, read.nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise if a shard that was read is not the file that was planned with."""
        for name in self._fds:
            status = os.stat(self._shards[name].path)
            if (status.st_size, status.st_mtime_ns) != self._stamp(name):
                raise _changed(name)

    def close(self) -> None:
        """Close all shards."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, name: str) -> int:
        with self._lock:
            if name not in self._fds:
                fd = os.open(self._shards[name].path, os.O_RDONLY | os.O_CLOEXEC)
                self._fds[name] = fd
                status = os.fstat(fd)
                if (status.st_size, status.st_mtime_ns) != self._stamp(name):
                    raise _changed(name)
            return self._fds[name]

    def _stamp(self, name: str) -> tuple[int, int]:
        shard = self._shards[name]
        return shard.nbytes, shard.mtime_ns


def _changed(name: str) -> EnvironmentFaultError:
    return EnvironmentFaultError(
        f"{show(name)}: changed while it was read; run again when the checkpoint is complete"
    )
