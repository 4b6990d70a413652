"""Read byte ranges of source shards with pread, never through a mapping.

Pages of a mapping count as memory of the process, and a file cut short under it kills the
process without a message.
"""

from __future__ import annotations

import errno
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock

from ..source.files import changed, open_planned
from ..source.headers import Shard
from ..source.stored import Read

__all__ = ["SourceReader"]

# Transient errors of network disks, and how long to wait before each new attempt. Descriptors are
# free again when other threads have read.
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET),
    *_NO_DESCRIPTORS,
)
_PAUSES_S = (0.5, 2.0, 8.0)
_LEAST_OPEN, _MOST_OPEN = 4, 64
_SHARE = 8  # of the descriptors that a process may have


class SourceReader:
    """Shards of a source, to be read by several threads; those that were read last are open.

    ``stop`` is set when no error is worth waiting for any more.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.stop = Event()
        self._shards = {shard.name: shard for shard in shards}
        self._were_read: set[str] = set()
        self._fds: dict[str, int] = {}  # the last one was used last
        self._users: Counter[int] = Counter()  # reads under way, by descriptor
        self._lock = Lock()
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed < 0:  # no limit
            allowed = _SHARE * _MOST_OPEN
        self._most = max(_LEAST_OPEN, min(allowed // _SHARE, _MOST_OPEN))

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
                with self._open(read.shard) as fd:
                    count = os.preadv(fd, [into[filled:]], position + filled)
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._close_idle(0)
                pause = next(pauses, None)
                if error.errno not in _PASSING or pause is None or self.stop.wait(pause):
                    path = str(self._shards[read.shard].path)
                    raise OSError(error.errno, error.strerror, path) from error
                self._reopen(read.shard)
                continue
            if count == 0:
                raise changed(read.shard)
            filled += count

    def forget(self, read: Read) -> None:
        """Let the system drop these bytes from its cache: they are not read again.

        A terabyte that passes through it would drive out everything else.
        """
        with suppress(OSError), self._open(read.shard) as fd:
            os.posix_fadvise(fd, read.offset, read.nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise if a shard that was read is not the file that was planned with."""
        for name in sorted(self._were_read):
            shard = self._shards[name]
            status = os.stat(shard.path)
            if (status.st_size, status.st_mtime_ns) != (shard.nbytes, shard.mtime_ns):
                raise changed(name)

    def close(self) -> None:
        """Close all shards; no thread reads any more."""
        with self._lock:
            for fd in {*self._fds.values(), *self._users}:
                os.close(fd)
            self._fds.clear()
            self._users.clear()

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        """A descriptor of a shard that stays open meanwhile."""
        with self._lock:
            fd = self._fds.pop(name, None)
            if fd is None:
                shard = self._shards[name]
                fd = open_planned(shard.path, name, shard.nbytes, shard.mtime_ns)
                self._were_read.add(name)
            self._fds[name] = fd
            self._users[fd] += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[fd] -= 1
                if not self._users[fd]:
                    del self._users[fd]
                    if self._fds.get(name) != fd:
                        os.close(fd)
            self._close_idle(self._most)

    def _close_idle(self, most: int) -> None:
        """Close what nobody reads from and was not used for longest, until so many are open."""
        with self._lock:
            for name, fd in list(self._fds.items())[: max(0, len(self._fds) - most)]:
                if fd not in self._users:
                    os.close(self._fds.pop(name))

    def _reopen(self, name: str) -> None:
        """Let the next read open the shard again; others may still be reading from the old one."""
        with self._lock:
            fd = self._fds.pop(name, None)
            if fd is not None and fd not in self._users:
                os.close(fd)
