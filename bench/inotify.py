"""Which files a process opens and reads, and when, without a part in it: Linux's inotify."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from pathlib import Path

__all__ = ["Watch", "first_reads"]

_ACCESS, _CLOSE, _OPEN = 0x01, 0x08 | 0x10, 0x20
_EVENT = struct.Struct("iIII")


class Watch:
    """Notes the reads of files in a folder until it is left; ``reads`` has what was seen.

    For each file, the time of the first read after each time that it was opened: not by a process
    that had it open already.
    """

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC)
        mask = ctypes.c_uint32(_ACCESS | _CLOSE | _OPEN)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify", str(folder))
        self.reads: dict[str, list[float]] = {}
        self._open: dict[str, int] = {}
        self._fresh: set[str] = set()
        self._end = folder / ".end-of-watch"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.touch()  # an event to wake the thread
        self._thread.join()
        self._end.unlink()
        os.close(self._fd)

    def _run(self) -> None:
        while True:
            data, now = os.read(self._fd, 1 << 16), time.monotonic()
            while data:
                _, mask, _, length = _EVENT.unpack_from(data)
                name = os.fsdecode(data[_EVENT.size :][:length].rstrip(b"\0"))
                data = data[_EVENT.size + length :]
                if name == self._end.name:
                    return
                self._note(name, mask, now)

    def _note(self, name: str, mask: int, now: float) -> None:
        if mask & _OPEN:
            if not self._open.get(name):
                self._fresh.add(name)
            self._open[name] = self._open.get(name, 0) + 1
        elif mask & _CLOSE:
            self._open[name] -= 1
        elif name in self._fresh:
            self._fresh.discard(name)
            self.reads.setdefault(name, []).append(now)


def first_reads(watch: Watch) -> tuple[float, float]:
    """When the first header was read, and the first weights, of the shards in the folder.

    Of a shard, weights are what is read after it was opened for the last time.
    """
    shards = [times for name, times in watch.reads.items() if name.endswith(".safetensors")]
    return min(times[0] for times in shards), min(times[-1] for times in shards)
