"""What a figure was measured on, and whether that machine was idle."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

__all__ = ["BUSY_LIMIT", "ROOT", "CpuClock", "facts", "idleness", "room_nbytes", "versions"]

ROOT = Path(__file__).parent.parent
BUSY_LIMIT = 0.10
_PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors")


class CpuClock:
    """CPU time of the whole machine since it was made, from /proc/stat."""

    def __init__(self) -> None:
        self._busy, self._all = _cpu_seconds()

    def share(self, own_seconds: float = 0.0) -> float:
        """Of all CPU time, the share that was not idle, less what we know to be our own.

        Time that a hypervisor gave to others counts as not idle.
        """
        busy, total = _cpu_seconds()
        spent = total - self._all
        return max(0.0, busy - self._busy - own_seconds) / spent if spent > 0 else 0.0


def _cpu_seconds() -> tuple[float, float]:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = [int(field) for field in fields]
    idle = ticks[3] + ticks[4]
    second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / second, sum(ticks) / second


def idleness(seconds: float = 1.0) -> dict[str, float]:
    """How busy others keep the machine, watched for a while in which we do nothing.

    Warns on stderr where figures will be worth little.
    """
    clock = CpuClock()
    time.sleep(seconds)
    busy = clock.share()
    if busy > BUSY_LIMIT:
        print(f"warning: the machine is {busy:.0%} busy with other work", file=sys.stderr)
    return {"busy": round(busy, 3), "load": round(os.getloadavg()[0], 2)}


def facts() -> dict[str, object]:
    """Hardware, versions, commit, date, and how busy the machine is now."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "cpu": _after_colon("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": _memory("MemTotal"),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
        **idleness(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def room_nbytes(folder: Path) -> int:
    """Bytes that can be written to a folder; in memory, no more than memory has."""
    free = shutil.disk_usage(folder).free
    return min(free, _memory("MemAvailable")) if _is_in_memory(folder) else free


def _is_in_memory(folder: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [m for m in mounts if folder.resolve().is_relative_to(m[1])]
    return max(inside, key=lambda m: len(m[1]), default=["", "", ""])[2] in ("tmpfs", "ramfs")


def _memory(field: str) -> int:
    return int((_after_colon("/proc/meminfo", field) or "0 kB").split()[0]) * 1024


def _after_colon(path: str, field: str) -> str | None:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def _output(*command: str) -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip() or None
    return None
