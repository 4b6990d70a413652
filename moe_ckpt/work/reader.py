"""Read byte ranges of source shards with pread, never through a mapping.

Pages of a mapping count as memory of the process, and a file cut short under it kills the
process without a message.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from threading import Event, Lock

from ..errors import EnvironmentFaultError, show
from ..source.headers import Shard
from ..source.stored import Read

__all__ = ["SourceReader"]

# Transient errors of network disks, and how long to wait before each new attempt.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)
_PAUSES_S = (0.5, 2.0, 8.0)


class SourceReader:
    """Open shards of a source, to be read by several threads.

    ``stop`` is set when no error is worth waiting for any more.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.stop = Event()
        self._shards = {shard.name: shard for shard in shards}
        self._fds: dict[str, int] = {}
        self._old_fds: list[int] = []
        self._lock = Lock()

    def read(self, read: Read, start: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of ``read`` from its byte ``start`` on.

        Raises:
            EnvironmentFaultError: the shard is not the file that was planned with.
            OSError: naming the shard, after several attempts where another may help.
        """
        position = read.offset + start
        filled = 0
        pauses = iter(_PAUSES_S)
        while filled < len(into):
            try:
                count = os.preadv(self._fd(read.shard), [into[filled:]], position + filled)
            except OSError as error:
                pause = next(pauses, None)
                if error.errno not in _PASSING or pause is None or self.stop.wait(pause):
                    path = str(self._shards[read.shard].path)
                    raise OSError(error.errno, error.strerror, path) from error
                self._reopen(read.shard)
                continue
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
        for name in list(self._fds):
            status = os.stat(self._shards[name].path)
            if (status.st_size, status.st_mtime_ns) != self._stamp(name):
                raise _changed(name)

    def close(self) -> None:
        """Close all shards."""
        for fd in (*self._fds.values(), *self._old_fds):
            os.close(fd)
        self._fds.clear()
        self._old_fds.clear()

    def _reopen(self, name: str) -> None:
        """Let the next read open the shard again; others may still be reading from the old one."""
        with self._lock:
            if name in self._fds:
                self._old_fds.append(self._fds.pop(name))

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
