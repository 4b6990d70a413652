"""Bad input of every kind: one line that says what and where, the right code, nothing touched."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from kit.command import run_cli
from kit.hostile import CONFIG, INDEX, S2, SHARD_OF, Case, json_bytes, make, packed
from kit.hostile import config as hostile_config
from kit.hostile import index as hostile_index
from kit.hostile import options as hostile_options
from kit.hostile import paths as hostile_paths
from kit.hostile import shards as hostile_shards

from moe_ckpt.cli.commands import cli
from moe_ckpt.cli.process import run

CASES = [
    *hostile_shards.SHARD_CASES,
    *hostile_index.INDEX_CASES,
    *hostile_config.CONFIG_CASES,
    *hostile_options.STATS_CASES,
    *hostile_options.RECIPE_CASES,
    *hostile_options.AMAX_CASES,
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
        raise AssertionError("the command hangs")

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
        code = run(partial(cli, args))
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


@contextmanager
def as_nobody():
    """Without root's right to everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may use."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        make(Path(name))
        # All modules are imported before the right to read them is gone.
        args = ("convert", f"{name}/in", f"{name}/first", "--stats", f"{name}/stats.json", "-q")
        assert run(partial(cli, args)) == 0
        shutil.rmtree(f"{name}/first")
        yield Path(name)


LOCKED = {  # what has which mode -> what is said
    "input": ("in", 0o000, "in: Permission denied"),
    "input that cannot be entered": ("in", 0o444, "Permission denied"),
    "config": ("in/config.json", 0o000, "config.json: cannot be read: Permission denied"),
    "index": (f"in/{INDEX}", 0o000, f"{INDEX}: cannot be read: Permission denied"),
    "shard": (f"in/{S2}", 0o000, f"{S2}: cannot be read: Permission denied"),
    "statistics": ("stats.json", 0o000, "stats.json: cannot be read: Permission denied"),
    "output": ("out", 0o555, "out"),
    "parent of the output": (".", 0o555, "Permission denied"),
}


@pytest.mark.parametrize(("name", "mode", "says"), LOCKED.values(), ids=LOCKED)
def test_without_permission(open_folder, capfd, name, mode, says):
    """The fault of the machine, not of the input; an output folder may also be refused."""
    if name == "out":
        (open_folder / "out").mkdir()
    before = tree(open_folder)
    usual = (open_folder / name).stat().st_mode
    (open_folder / name).chmod(mode)
    args = ("convert", f"{open_folder}/in", f"{open_folder}/out")
    try:
        with as_nobody():
            code = run(partial(cli, [*args, "--stats", f"{open_folder}/stats.json"]))
    finally:
        (open_folder / name).chmod(usual)
    out, err = capfd.readouterr()
    assert code == 5 or (name == "out" and code == 4), err
    passed_over = ("moe-ckpt: note: ", "moe-ckpt: warning: ")  # the model has no embedding
    errors = [line for line in err.splitlines() if not line.startswith(passed_over)]
    assert len(errors) == 1
    assert errors[0].startswith("moe-ckpt: error: ")
    assert says in errors[0]
    assert out == ""
    assert tree(open_folder) == before


# Run with an address space that only a text parsed within bounds leaves room in.
BOUNDED = """
import resource, sys
from moe_ckpt.cli.process import main
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
sys.argv[0] = "moe-ckpt"
main()
"""
MIB = 1 << 20


def bounded(limit: int, *args: object) -> subprocess.CompletedProcess[str]:
    code = BOUNDED.format(limit=limit)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def repeated(unit: str, nbytes: int) -> bytes:
    """A JSON object with a list of many of these."""
    return b'{"x":[%s]}' % ",".join([unit] * (nbytes // (len(unit) + 1))).encode()


HUGE = {
    "lists": repeated("[]", 99_000_000),
    "objects": repeated('{"a":1}', 99_000_000),
    "deep objects": repeated('{"a":' * 900 + "1" + "}" * 900, 99_000_000),
    "numbers": repeated("0", 99_000_000),
    "text": repeated('"' + "x" * 999 + '"', 99_000_000),
    "BOM": b"\xef\xbb\xbf" + repeated("1000000", 99_000_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("place", ["header", "index"])
def test_huge_texts_take_little_memory(tmp_path, text, place):
    make(tmp_path)
    name = S2 if place == "header" else INDEX
    (tmp_path / "in" / name).write_bytes(packed(text) if place == "header" else text)
    done = bounded(600 * MIB, "convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"moe-ckpt: error: {name}: ")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < LINE_LENGTH


@pytest.mark.slow
def test_many_tensors_take_little_memory(tmp_path):
    make(tmp_path)
    count = 50_000
    header = {
        f"model.layers.{n}.odd.weight": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
        for n in range(count)
    }
    (tmp_path / "in" / "many.safetensors").write_bytes(packed(json_bytes(header), bytes(count)))
    weight_map = SHARD_OF | dict.fromkeys(header, "many.safetensors")
    (tmp_path / "in" / INDEX).write_bytes(json_bytes({"weight_map": weight_map}))
    done = bounded(500 * MIB, "convert", tmp_path / "in", tmp_path / "out", "--dry-run", "-q")
    assert done.returncode == 3  # layers that the config does not have
    assert "num_hidden_layers=1" in done.stderr
    (tmp_path / "in" / "config.json").write_bytes(json_bytes(CONFIG | {"num_hidden_layers": None}))
    done = bounded(500 * MIB, "convert", tmp_path / "in", tmp_path / "out", "--dry-run", "-q")
    assert done.returncode == 0, done.stderr


def test_many_problems_are_counted(tmp_path, capfd):
    make(tmp_path)
    weight_map = {f"tensor {n}": f"model-{n:07d}.safetensors" for n in range(50_000)}
    (tmp_path / "in" / INDEX).write_bytes(json_bytes({"weight_map": weight_map}))
    assert run(partial(cli, ["convert", f"{tmp_path}/in", f"{tmp_path}/out"])) == 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0] == (
        "moe-ckpt: error: model-0000000.safetensors: shard is missing; download the checkpoint "
        "again"
    )
    assert lines[-1] == "moe-ckpt: error: and 49980 more problems of this kind"


def test_memory_that_runs_out_is_no_bug(tmp_path):
    make(tmp_path)
    text = repeated('{"a":1}', 10_000_000)
    (tmp_path / "in" / INDEX).write_bytes(text)
    done = bounded(100 * MIB, "convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 5, done.stderr
    assert done.stderr == "moe-ckpt: error: memory ran out; free some and run again\n"
