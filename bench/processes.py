"""Run a command as a whole process: its time, its CPU time, its memory.

Peak memory is the resident set as the kernel counts it, with pages of files that are mapped. A
child starts with the peak of its parent, so whoever measures must stay small: no numpy or torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .machine import ROOT, CpuClock

__all__ = ["Measured", "call", "python", "run"]

_TAIL = 400


@dataclass(frozen=True, slots=True)
class Measured:
    """What one or several processes took, one after the other.

    ``others``: the share of the machine's CPU time that went to other processes meanwhile.
    ``error``: the end of what it printed, if it failed. ``stdout``: what it printed, if asked for.
    """

    seconds: float
    cpu_seconds: float
    peak_nbytes: int
    others: float = 0.0
    error: str | None = None
    stdout: str = ""

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_nbytes, other.peak_nbytes),
            max(self.others, other.others),
            self.error or other.error,
        )


def run(command: Sequence[object]) -> Measured:
    """Run a command in the root of the repository, so that `python -m` finds this very tree."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        clock = CpuClock()
        started = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=log)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        others = clock.share(cpu)
        error = None
        if process.returncode:
            log.seek(max(0, log.tell() - _TAIL))
            text = log.read().decode(errors="replace").strip()
            error = text.splitlines()[-1] if text else f"exit code {process.returncode}"
        out.seek(0)
        stdout = out.read().decode(errors="replace")
    return Measured(seconds, cpu, usage.ru_maxrss * 1024, round(others, 3), error, stdout)


def python(executable: object, code: str) -> Measured:
    """Run one line of Python."""
    return run([executable, "-c", code])


def call(name: str, *arguments: object) -> tuple[Measured, Any]:
    """Call ``module:function`` of this package in a fresh process; what it returns goes by JSON.

    Arguments are JSON too. A process that fails ends this one with what it printed.
    """
    module, _, function = name.partition(":")
    code = (
        f"import json, sys; from bench.{module} import {function} as f; "
        "print(json.dumps(f(*map(json.loads, sys.argv[1:]))))"
    )
    words = [json.dumps(value, default=str) for value in arguments]
    measured = run([sys.executable, "-c", code, *words])
    if measured.error:
        sys.exit(f"{name} failed: {measured.error}")
    return measured, json.loads(measured.stdout.splitlines()[-1])
