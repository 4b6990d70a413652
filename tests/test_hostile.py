"""Bad input of every kind: one line that says what and where, the right code, nothing touched."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
from functools import partial
from pathlib import Path

import hostile_json
import hostile_paths
import hostile_shards
import pytest
from conftest import run_cli
from hostile import Case, make

from moe_ckpt.cli import _run, cli

CASES = [
    *hostile_shards.SHARD_CASES,
    *hostile_shards.INDEX_CASES,
    *hostile_json.CONFIG_CASES,
    *hostile_json.STATS_CASES,
    *hostile_json.RECIPE_CASES,
    *hostile_json.AMAX_CASES,
    *hostile_paths.PATH_CASES,
    *hostile_paths.WEIGHT_CASES,
]
# Each of these runs as a user runs it; the others in this process, from the same entry.
INSTALLED = {case.name for case in CASES[::24]}
FINISHED = {"config.json", "model.safetensors.index.json"}
LINE_LENGTH = 700
LINE = re.compile(r"moe-ckpt: (error|note|warning): .+")


@pytest.fixture(autouse=True)
def _no_hang():
    """A FIFO or a device that is waited for fails the test instead of stopping all of them."""

    def stop(*_):
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tree(folder: Path, without: str = "") -> dict[str, object]:
    """All that is in a folder: what it is, its bytes, when they were written, where it links to."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if without and name.split("/")[0] == without:
            continue
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode) and status.st_size < 50_000_000:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        when = status.st_mtime_ns if not stat.S_ISDIR(status.st_mode) or name == "in" else 0
        found[name] = (status.st_mode, status.st_size, when, content)
    return found


def test_there_are_many():
    assert len(CASES) == len({case.name for case in CASES})
    assert len(CASES) > 350
    assert len(INSTALLED) > 12


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(tmp_path, capfd, case: Case):
    make(tmp_path)
    case.edit(tmp_path)
    late = case.out_dir if case.is_late else ""
    before = tree(tmp_path, late)
    args = [arg.replace("{}", str(tmp_path)) for arg in case.args]
    args = ["convert", f"{tmp_path}/{case.in_dir}", f"{tmp_path}/{case.out_dir}", *args]
    if case.name in INSTALLED:
        done = run_cli(*args)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code = _run(partial(cli, args))
        out, err = capfd.readouterr()

    lines = err.removesuffix("\n").split("\n")
    assert code == case.code, err
    assert out == ""
    for line in lines:
        assert LINE.fullmatch(line), line
        assert line.isprintable()
        assert len(line) <= LINE_LENGTH
    errors = [line for line in lines if line.startswith("moe-ckpt: error: ")]
    assert any(all(text in line for text in case.says) for line in errors), err
    assert "Traceback" not in err
    assert tree(tmp_path, late) == before
    if case.is_late and (tmp_path / case.out_dir).exists():
        assert not FINISHED & {path.name for path in (tmp_path / case.out_dir).iterdir()}
