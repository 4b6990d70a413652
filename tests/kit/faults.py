"""Run conversions that fail: ``python faults.py MODE SOURCE FOLDER [ARGUMENT]``.

Each conversion is a forked child, so that a kill is a kill. The operations on the disk that can
leave something behind are counted, and the N-th of them fails. Prints one JSON document.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import moe_ckpt
import moe_ckpt.output.lock
import moe_ckpt.work.reader
from moe_ckpt.engines import backend_for
from moe_ckpt.errors import EnvironmentFaultError, MoeCkptError, OutputRefusedError, VerifyError

OPTIONS = {"max_shard_size": 60_000}
OPERATIONS = ("fsync", "pwrite", "replace", "link", "unlink", "mkdir", "rmdir", "posix_fallocate")
NAMING = ("replace", "link")  # the journal's way, and that of all other files
ENDED, OTHER, PASSED, HARMLESS = 0, 70, 80, 81  # harmless: an old file is not removed, say


def child(work) -> int:
    """The exit status of a child that does this: that of `waitpid`."""
    pid = os.fork()
    if pid == 0:
        code = OTHER
        try:
            work()
            code = ENDED
        except MoeCkptError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def fail_at(number, fault, after):
    """Let the N-th operation fail, before or after it is done."""
    done = 0

    def wrap(real):
        def operation(*args, **kwargs):
            nonlocal done
            done += 1
            hit = done == number
            if hit and not after:
                fault()
            try:
                return real(*args, **kwargs)
            finally:
                if hit and after:
                    fault()

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return lambda: done


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def raising(number):
    def fault():
        raise OSError(number, os.strerror(number))

    return fault


def tree(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def loadable(out: Path, whole: dict[str, bytes]) -> str:
    """What is wrong with what a loader would take: nothing, or all of it, must be there."""
    files = tree(out) if out.is_dir() else {}
    if "config.json" not in files:
        return "an index without config.json" if "model.safetensors.index.json" in files else ""
    shards = {name for name in whole if name.endswith(".safetensors")}
    wrong = {name for name in shards if files.get(name) != whole[name]}
    return f"loadable, but not whole: {sorted(wrong)}" if wrong else ""


def convert(source, out, **more):
    moe_ckpt.convert(source, out, device="cpu", **OPTIONS, **more)


class Runs:
    """Conversions of one source into fresh folders, each repeated until it ends."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        convert(source, folder / "whole")  # compiles, too
        self.whole = tree(folder / "whole")
        self.wrong: list[str] = []
        self.count = 0

    def check(self, name, status, expected, out) -> None:
        """Judge a run that was to fail, then let the same one end."""
        self.count += 1
        found = os.waitstatus_to_exitcode(status)
        if found not in expected:
            self.wrong.append(f"{name}: ended with {found}")
        problem = loadable(out, self.whole)
        if problem:
            self.wrong.append(f"{name}: {problem}")
        again = os.waitstatus_to_exitcode(child(lambda: convert(self.source, out)))
        if again != ENDED:
            self.wrong.append(f"{name}: the same command ended with {again}")
        elif tree(out) != self.whole:
            self.wrong.append(f"{name}: not the same bytes")

    def report(self) -> None:
        json.dump({"runs": self.count, "wrong": self.wrong[:20]}, sys.stdout)


def at_every_step(runs: Runs, fault_name: str) -> None:
    """Fail at every operation in turn, until one conversion passes."""
    faults = {
        "kill": (kill, {-signal.SIGKILL}),
        "enospc": (raising(errno.ENOSPC), {5, HARMLESS}),
        "eio": (raising(errno.EIO), {5, HARMLESS}),
    }
    fault, expected = faults[fault_name]
    for number in count(1):
        out = runs.folder / "out" / f"{fault_name}-{number}"

        def work(out=out, number=number):
            done = fail_at(number, fault, after=fault_name == "kill" and number % 2)
            convert(runs.source, out)
            os._exit(PASSED if done() < number else HARMLESS)

        status = child(work)
        if os.waitstatus_to_exitcode(status) == PASSED:
            return
        runs.check(f"{fault_name} at {number}", status, expected, out)


def at_random(runs: Runs, times: int) -> None:
    """Kill at random moments, again and again in one folder until it is complete."""
    draw = random.Random(6)
    started = time.monotonic()
    child(lambda: convert(runs.source, runs.folder / "timed"))
    takes = time.monotonic() - started
    for number in range(times):
        out = runs.folder / "out" / f"random-{number}"
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    convert(runs.source, out)
                finally:
                    os._exit(ENDED)
            time.sleep(draw.random() * takes)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            problem = loadable(out, runs.whole)
            if problem:
                runs.wrong.append(f"random {number}: {problem}")
        runs.check(f"random {number}", status, {-9, ENDED}, out)


def two_at_once(runs: Runs, times: int) -> None:
    """Two conversions into one folder where locks do nothing: both write the same."""
    moe_ckpt.output.lock._acquire = lambda _lock, _private: False
    for number in range(times):
        out = runs.folder / "out" / f"two-{number}"
        pids = []
        for delay in (0.0, 0.02 * number):
            pid = os.fork()
            if pid == 0:
                code = OTHER
                try:
                    time.sleep(delay)
                    convert(runs.source, out)
                    code = ENDED
                except MoeCkptError as error:
                    code = error.exit_code
                finally:
                    os._exit(code)
            pids.append(pid)
        for pid in pids:
            found = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            errors = (EnvironmentFaultError, OutputRefusedError, VerifyError)  # the other's doing
            if found not in (ENDED, *(error.exit_code for error in errors)):
                runs.wrong.append(f"two {number}: one ended with {found}")
        runs.check(f"two {number}", 0, {0}, out)


def order_of_operations(runs: Runs) -> None:
    """What a power cut needs: data on disk, then the record, then the name, then the folder."""
    log: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "pwrite", *NAMING)}

    def logged(name):
        def operation(first, *args):
            is_fd = isinstance(first, int)
            path = os.readlink(f"/proc/self/fd/{first}") if is_fd else str(first)
            done = real[name](first, *args)
            log.append((name, f"{path} -> {args[0]}" if name in NAMING else path))
            return done

        return operation

    for name in real:
        setattr(os, name, logged(name))
    out = runs.folder / "ordered"
    convert(runs.source, out)
    for name, function in real.items():
        setattr(os, name, function)
    journal = str(out / ".moe-ckpt" / "journal.jsonl")
    names = [position for position, (name, _) in enumerate(log) if name in NAMING]
    for position, following in zip(names, [*names[1:], len(log)], strict=True):
        partial, final = log[position][1].split(" -> ")
        before = log[:position]
        synced, written, recorded = (
            max((at for at, entry in enumerate(before) if entry == looked_for), default=-1)
            for looked_for in (("fsync", partial), ("pwrite", partial), ("fsync", journal))
        )
        runs.count += 1
        if synced <= written:
            runs.wrong.append(f"{final}: named before it is on disk")
        last = final.endswith(("index.json", "config.json"))
        if final != journal and not last and recorded < synced:
            runs.wrong.append(f"{final}: named before it is recorded")
        if ("fsync", str(Path(final).parent)) not in log[position:following]:
            runs.wrong.append(f"{final}: its name is not put on disk")


def main() -> None:
    mode, source, folder, *rest = sys.argv[1:]
    moe_ckpt.work.reader._PAUSES_S = (0.0, 0.0, 0.0)
    backend_for("cpu")
    runs = Runs(Path(source), Path(folder))
    if mode == "steps":
        at_every_step(runs, rest[0])
    elif mode == "random":
        at_random(runs, int(rest[0]))
    elif mode == "two":
        two_at_once(runs, int(rest[0]))
    else:
        order_of_operations(runs)
    runs.report()


if __name__ == "__main__":
    main()
