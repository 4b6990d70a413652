"""Conversions that are interrupted, that fail, that meet: what stays, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from kit.command import run_cli, run_here, wait_for_a_shard
from kit.faults import tree
from kit.files import FIXTURES

import moe_ckpt
from moe_ckpt.errors import CheckpointError, EnvironmentFaultError, OutputRefusedError, VerifyError
from moe_ckpt.output.journal import read_journal
from moe_ckpt.output.writer import OutputFolder
from moe_ckpt.work import reader

SOURCE = FIXTURES / "qwen3_moe" / "source"
STATS = FIXTURES / "qwen3_moe" / "stats.json"
FAULTS = Path(__file__).parents[1] / "kit" / "faults.py"
SHARDS = {"max_shard_size": 30_000}
COMMAND = Path(sys.executable).with_name("moe-ckpt")


@pytest.fixture
def source(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def whole(source, tmp_path):
    """All files of an uninterrupted conversion."""
    moe_ckpt.convert(source, tmp_path / "whole", **SHARDS)
    return tree(tmp_path / "whole")


class StopError(Exception):
    pass


def stop_after(count):
    """A progress callback that gives up once so many shards are finished."""

    def progress(_nbytes, shard):
        nonlocal count
        count -= shard is not None
        if count == 0:
            raise StopError

    return progress


def interrupted(source, out, after=2, **options):
    with pytest.raises(StopError):
        moe_ckpt.convert(source, out, progress=stop_after(after), **{**SHARDS, **options})
    return sorted(path.name for path in out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("mode", "argument", "least"),
    [
        pytest.param("steps", "kill", 80, marks=pytest.mark.slow),
        pytest.param("steps", "enospc", 80, marks=pytest.mark.slow),
        pytest.param("steps", "eio", 80, marks=pytest.mark.slow),
        pytest.param("random", "50", 50, marks=pytest.mark.slow),
        ("two", "10", 10),
        ("order", "", 10),
    ],
)
def test_faults(tmp_path, mode, argument, least):
    """See faults.py: whatever fails, nothing looks finished, and the same command ends it."""
    args = [sys.executable, FAULTS, mode, SOURCE, tmp_path, argument]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["runs"] >= least


def test_what_is_finished_is_not_made_again(source, tmp_path, whole):
    out = tmp_path / "out"
    kept = interrupted(source, out)
    assert len(kept) >= 2
    assert {p.name for p in out.iterdir()} == {*kept, ".moe-ckpt"}
    inodes = {name: (out / name).stat().st_ino for name in kept}
    result = moe_ckpt.convert(source, out, **SHARDS)
    assert result.resumed == len(kept)
    assert not result.was_complete
    assert {name: (out / name).stat().st_ino for name in kept} == inodes
    assert tree(out) == whole


def test_the_journal_has_what_a_hub_shows(source, tmp_path, whole):
    import hashlib

    journal = read_journal(tmp_path / "whole")
    files = {name: data for name, data in whole.items() if not name.startswith(".moe-ckpt/")}
    assert {name: (r.nbytes, r.sha256) for name, r in journal.records.items()} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
    }
    assert list(journal.records)[-2:] == ["config.json", "model.safetensors.index.json"]
    assert journal.head.plan == moe_ckpt.make_plan(source, **SHARDS).digest()
    assert set(whole) - set(files) == {".moe-ckpt/journal.jsonl"}


def test_a_complete_output_is_left_alone(source, tmp_path, whole):
    out = tmp_path / "whole"
    before = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    done = run_cli("convert", source, out, "--max-shard-size", "30000")
    assert done.returncode == 0
    assert done.stderr.endswith(f"already complete: {out}\n")
    assert {path: path.stat() for path in before} == before
    assert tree(out) == whole


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "longer", "delete", "folder", "link"])
def test_a_damaged_shard_is_made_again(source, tmp_path, whole, damage, complete):
    out = tmp_path / "whole" if complete else tmp_path / "out"
    if not complete:
        interrupted(source, out)
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    if damage == "folder":
        shard.mkdir()
        with pytest.raises(EnvironmentFaultError, match=shard.name):
            moe_ckpt.convert(source, out, **SHARDS)
        shard.rmdir()
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(whole[shard.name])
        shard.symlink_to(tmp_path / "elsewhere")
    elif damage != "delete":
        changed = {"flip": data, "cut": data[:-1], "zero": bytes(len(data)), "longer": data + b"x"}
        shard.write_bytes(changed[damage])
    result = moe_ckpt.convert(source, out, **SHARDS)
    assert not result.was_complete
    assert tree(out) == whole
    assert not shard.is_symlink()
    if damage == "link":
        assert (tmp_path / "elsewhere").read_bytes() == whole[shard.name]


def test_a_damaged_shard_makes_a_complete_folder_unloadable_first(source, tmp_path, whole):
    """If the repair is interrupted as well, nothing may look finished."""
    out = tmp_path / "whole"
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(bytes(shard.stat().st_size))

    def give_up(_nbytes, _shard):
        assert not (out / "config.json").exists()
        assert not (out / "model.safetensors.index.json").exists()
        raise StopError

    with pytest.raises(StopError):
        moe_ckpt.convert(source, out, progress=give_up, **SHARDS)
    moe_ckpt.convert(source, out, **SHARDS)
    assert tree(out) == whole


def test_trust_journal_compares_sizes_only(source, tmp_path, whole):
    out = tmp_path / "out"
    first, second, *_ = interrupted(source, out)
    data = bytearray((out / first).read_bytes())
    data[-1] ^= 1
    (out / first).write_bytes(data)
    (out / second).write_bytes(b"")
    moe_ckpt.convert(source, out, trust_journal=True, **SHARDS)
    assert tree(out) == {**whole, first: bytes(data)}


def test_an_edited_small_file_is_not_replaced(source, tmp_path, whole):
    out = tmp_path / "whole"
    edited = whole["config.json"] + b" "
    (out / "config.json").write_bytes(edited)
    with pytest.raises(OutputRefusedError, match=r"config\.json was changed since"):
        moe_ckpt.convert(source, out, **SHARDS)
    assert tree(out) == {**whole, "config.json": edited}
    moe_ckpt.convert(source, out, overwrite=True, **SHARDS)
    assert tree(out) == whole


@pytest.mark.parametrize(
    "name", ["notes.txt", "tokenizer.json", "config.json", "model-00004-of-00009.safetensors"]
)
def test_a_file_of_the_users_is_not_replaced(source, tmp_path, name):
    """Even where the conversion would write one of that name."""
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    interrupted(source, out)
    names = {shard.name for shard in moe_ckpt.make_plan(source, **SHARDS).shards}
    name = sorted(names)[-1] if name.startswith("model-") else name
    (out / name).write_text("mine")
    before = tree(out)
    for overwrite in (False, True):
        with pytest.raises(OutputRefusedError, match=name):
            moe_ckpt.convert(source, out, overwrite=overwrite, **SHARDS)
        assert tree(out) == before


def touch(source):
    path = next(source.glob("*.safetensors"))
    os.utime(path, ns=(1, 1))


def rename_tensor(source):
    for file in (*source.glob("*.safetensors"), source / "model.safetensors.index.json"):
        file.write_bytes(
            # in all layers: one that lacked what the others have would be refused
            file.read_bytes().replace(b".input_layernorm", b".input_layernorn")
        )


def edit_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mine": 1}))


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, {"format": "nvfp4-w4a16"}, "--format was nvfp4 and is nvfp4-w4a16 now"),
        (None, {"quantize": "linear"}, "--quantize was experts and is linear now"),
        (None, {"max_shard_size": 70_000}, "--max-shard-size was 30000 and is 70000 now"),
        (None, {"dialect": "compressed-tensors"}, "--dialect was not given and is compressed-"),
        (None, {"missing_stats": "constant"}, "--missing-stats was error and is constant now"),
        (None, {"stats": [STATS]}, "--stats is given now only"),
        (touch, {}, "files of the source were written since"),
        (rename_tensor, {}, "the source has other files, sizes or headers"),
        (edit_config, {}, "the source's config.json says other things"),
    ],
)
def test_another_conversion_is_refused(source, tmp_path, change, options, said):
    out = tmp_path / "out"
    interrupted(source, out)
    before = tree(out)
    if change:
        change(source)
    with pytest.raises(OutputRefusedError, match=said) as caught:
        moe_ckpt.convert(source, out, **{**SHARDS, **options})
    assert "--overwrite" in str(caught.value)
    assert tree(out) == before
    moe_ckpt.convert(source, out, overwrite=True, **{**SHARDS, **options})
    moe_ckpt.convert(source, tmp_path / "fresh", **{**SHARDS, **options})
    assert tree(out) == tree(tmp_path / "fresh")


def test_other_statistics_are_refused(source, tmp_path):
    stats = tmp_path / "stats.json"
    document = json.loads(STATS.read_text())
    stats.write_text(json.dumps(document))
    out = tmp_path / "out"
    interrupted(source, out, stats=[stats])
    shutil.copy(stats, tmp_path / "moved.json")
    stats.write_text(json.dumps(document | {"note": 1}))
    with pytest.raises(OutputRefusedError, match="--stats has another content"):
        moe_ckpt.convert(source, out, stats=[stats], **SHARDS)
    with pytest.raises(OutputRefusedError, match="--stats was given before only"):
        moe_ckpt.convert(source, out, **SHARDS)
    moe_ckpt.convert(source, out, stats=[tmp_path / "moved.json"], **SHARDS)


def test_another_version_is_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out)
    began = moe_ckpt.__version__
    monkeypatch.setattr("moe_ckpt.planning.provenance.__version__", "99.0")
    with pytest.raises(OutputRefusedError, match=f"moe-ckpt {began} began it, this is 99.0"):
        moe_ckpt.convert(source, out, **SHARDS)


def test_what_changes_no_byte_may_differ(source, tmp_path, whole):
    out = tmp_path / "out"
    interrupted(source, out, limits=moe_ckpt.Limits(workers=1, memory="8MiB"))
    limits = moe_ckpt.Limits(workers=12, memory="64MiB")  # three shards are hashed at once
    moe_ckpt.convert(source, out, limits=limits, device="cpu", format="nvfp4", **SHARDS)
    assert tree(out) == whole


def test_contents_of_the_source_count_if_they_are_hashed(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out, hash_source=True)
    touch(source)
    with pytest.raises(OutputRefusedError, match="--hash-source compares their contents"):
        moe_ckpt.convert(source, out, **SHARDS)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    moe_ckpt.convert(source, out, hash_source=True, **SHARDS)
    moe_ckpt.convert(source, tmp_path / "fresh", hash_source=True, **SHARDS)
    assert tree(out) == tree(tmp_path / "fresh")

    path = sorted(source.glob("*.safetensors"))[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputRefusedError, match=f"other contents: {path.name}"):
        moe_ckpt.convert(source, again, hash_source=True, **SHARDS)


def test_a_torn_last_line_of_the_journal_counts_for_nothing(source, tmp_path, whole):
    out = tmp_path / "out"
    interrupted(source, out)
    journal = out / ".moe-ckpt" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for tail in (lines[-1][:-1], lines[-1][:9], b"\0" * 70):
        copy = tmp_path / f"out{len(tail)}"
        shutil.copytree(out, copy)
        (copy / ".moe-ckpt" / "journal.jsonl").write_bytes(b"".join(lines[:-1]) + tail)
        moe_ckpt.convert(source, copy, **SHARDS)
        assert tree(copy) == whole


def test_nothing_finished_leaves_nothing(source, tmp_path):
    with pytest.raises(StopError):
        moe_ckpt.convert(source, tmp_path / "a" / "b", progress=stop_now, **SHARDS)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(StopError):
        moe_ckpt.convert(source, tmp_path / "empty", progress=stop_now, **SHARDS)
    assert list((tmp_path / "empty").iterdir()) == []


def stop_now(_nbytes, _shard):
    raise StopError


def test_a_journal_that_is_gone_is_not_begun_in_its_middle(source, tmp_path):
    """As when a run that no lock kept out has removed it."""
    out = tmp_path / "out"

    def remove(_nbytes, _shard):
        (out / ".moe-ckpt" / "journal.jsonl").unlink(missing_ok=True)

    with pytest.raises(EnvironmentFaultError, match="journal"):
        moe_ckpt.convert(source, out, progress=remove, **SHARDS)
    assert not out.exists()


def test_what_another_run_finished_keeps_its_record(source, tmp_path, whole):
    """As where a file system forgets locks: who fails first has finished nothing itself."""
    out, first = tmp_path / "out", min(name for name in whole if name.endswith(".safetensors"))
    record = whole[".moe-ckpt/journal.jsonl"].splitlines(keepends=True)[1]
    assert json.loads(record)["file"] == first

    def publish(_nbytes, _shard):
        with (out / ".moe-ckpt" / "journal.jsonl").open("ab") as journal:
            journal.write(record)
        (out / first).write_bytes(whole[first])
        raise StopError

    with pytest.raises(StopError):
        moe_ckpt.convert(source, out, progress=publish, **SHARDS)
    assert moe_ckpt.convert(source, out, **SHARDS).resumed == 1
    assert tree(out) == whole


def test_a_bad_weight_late_costs_nothing_that_is_finished(source, tmp_path, whole):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.experts.gate_up_proj"
    index = json.loads((source / "model.safetensors.index.json").read_text())
    path = source / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name][7, 0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        moe_ckpt.convert(source, out, **SHARDS)
    names = {p.name for p in out.iterdir()}
    assert "config.json" not in names
    assert any(n.endswith(".safetensors") for n in names)


# The source's disk.


@pytest.fixture
def preadv(monkeypatch):
    """Put a shim around the reader's system call."""
    real = os.preadv
    monkeypatch.setattr(reader, "_PAUSES_S", tuple(0.0 for _ in reader._PAUSES_S))

    def put(shim):
        monkeypatch.setattr(os, "preadv", partial(shim, real))

    return put


def of_source(fd):
    return "/in/" in os.readlink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_read_errors_that_pass_are_waited_for(source, tmp_path, whole, preadv, number):
    calls = 0

    def shim(real, fd, buffers, offset):
        nonlocal calls
        calls += of_source(fd)
        if of_source(fd) and calls % 4 == 0:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    preadv(shim)
    moe_ckpt.convert(source, tmp_path / "out", **SHARDS)
    assert calls > 20
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_read_errors_that_stay_are_named_and_resumable(source, tmp_path, whole, preadv, number):
    out = tmp_path / "out"
    attempts = Counter()

    def shim(real, fd, buffers, offset):
        if of_source(fd) and len(list(out.glob("*.safetensors"))) >= 2:
            attempts[os.readlink(f"/proc/self/fd/{fd}"), offset] += 1
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    preadv(shim)
    limits = moe_ckpt.Limits(workers=1)
    with pytest.raises(EnvironmentFaultError, match=r"in/model-0000.*run the same command again"):
        moe_ckpt.convert(source, out, limits=limits, **SHARDS)
    assert max(attempts.values()) == (4 if number == errno.EIO else 1)
    preadv(lambda real, *args: real(*args))
    assert moe_ckpt.convert(source, out, **SHARDS).resumed >= 2
    assert tree(out) == whole


def test_short_reads_change_nothing(source, tmp_path, whole, preadv):
    def shim(real, fd, buffers, offset):
        return real(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)

    preadv(shim)
    moe_ckpt.convert(source, tmp_path / "out", **SHARDS)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("change", ["cut", "touch", "replace"])
def test_a_source_that_changes_in_mid_run_is_noticed(source, tmp_path, change):
    """The shard that is being made is not published, whatever of the source is open already."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (source / "model.safetensors.index.json").unlink()
    only = source / "model.safetensors"
    save_file(tensors, only, metadata={"format": "pt"})
    shards = len(moe_ckpt.make_plan(source, **SHARDS).shards)
    out = tmp_path / "out"
    changed = []

    def progress(_nbytes, shard):
        if shard is None or changed:
            return
        changed.extend(path.name for path in out.glob("*.safetensors"))
        if change == "cut":
            os.truncate(only, only.stat().st_size - 2)
        elif change == "touch":
            os.utime(only, ns=(1, 1))
        else:
            shutil.copy(only, tmp_path / "new")
            os.utime(tmp_path / "new", ns=(2, 2))
            (tmp_path / "new").replace(only)

    with pytest.raises(EnvironmentFaultError, match=r"model.safetensors: changed while it was"):
        moe_ckpt.convert(source, out, progress=progress, **SHARDS)
    assert changed
    # At most the one that was being flushed when the change came.
    published = list(out.glob("*.safetensors"))
    assert len(published) <= len(changed) + 1 < shards
    assert not (out / "config.json").exists()


# What others do in mid-run.


@pytest.fixture
def in_mid_run(monkeypatch):
    """Let something happen once a shard has its name, or once all have and files are copied."""

    def put(act, name="publish_shard"):
        real, acts = getattr(OutputFolder, name), [act]

        def method(self, *args):
            if name == "finish" and acts:
                acts.pop()()
            done = real(self, *args)
            if acts:
                acts.pop()()
            return done

        monkeypatch.setattr(OutputFolder, name, method)

    return put


def convert_here(source, out, *args):
    return run_here("convert", source, out, "-q", "--max-shard-size", "30000", *args)


def errors_of(done):
    return [line for line in done.stderr.splitlines() if "warning: no statistics" not in line]


CHANGES = {
    "edited": lambda path, _: path.write_text("{ }"),
    "appended": lambda path, _: path.write_text(path.read_text() + " "),
    "written again": lambda path, _: os.utime(path, ns=(1, 1)),
    "a FIFO": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "a link out": lambda path, secret: (path.unlink(), path.symlink_to(secret)),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "gone": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("when", ["publish_shard", "finish"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_side_file_that_changes_in_mid_run_is_noticed(source, tmp_path, in_mid_run, when, change):
    """At once, and it is as planned or not there; put back, the same command goes on."""
    path, secret, out = source / "tokenizer.json", tmp_path / "secret", tmp_path / "out"
    path.write_text("[1]")
    secret.write_text("[2]")
    for file in (path, secret):
        os.utime(file, ns=(7, 7))
    shards = moe_ckpt.make_plan(source, **SHARDS).shards
    in_mid_run(lambda: change(path, secret), when)
    done = convert_here(source, out)
    assert done.returncode == 5, done.stderr
    (error,) = errors_of(done)
    assert error.startswith("moe-ckpt: error: ")
    assert "tokenizer.json: " in error
    stay = list(out.glob("*.safetensors"))
    assert 1 <= len(stay) <= (3 if when == "publish_shard" else len(shards)) <= len(shards)
    assert not (out / "tokenizer.json").exists()
    assert not (out / "config.json").exists()

    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("[1]")
    os.utime(path, ns=(7, 7))
    assert convert_here(source, out).returncode == 0
    assert (out / "tokenizer.json").read_text() == "[1]"


def test_a_side_file_that_cannot_be_opened_costs_no_work(source, tmp_path, monkeypatch):
    (source / "tokenizer.json").write_text("[1]")
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("in/tokenizer.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    done = convert_here(source, tmp_path / "out")
    assert done.returncode == 5
    assert "tokenizer.json: cannot be read: Permission denied" in done.stderr
    assert not (tmp_path / "out").exists()


def test_contents_of_side_files_count_if_they_are_hashed(source, tmp_path):
    path, out = source / "tokenizer.json", tmp_path / "out"
    path.write_text("[1]")
    interrupted(source, out, hash_source=True)
    path.write_text("[2]")
    done = convert_here(source, out, "--hash-source")
    assert done.returncode == 4
    assert "files of the source have other contents: tokenizer.json" in done.stderr
    path.write_text("[1]")
    assert "--hash-source compares their contents" in convert_here(source, out).stderr
    assert convert_here(source, out, "--hash-source").returncode == 0


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("last shard", lambda path, _: path.write_text("mine")),
        ("last shard", Path.symlink_to),
        ("last shard", lambda path, _: path.mkdir()),
        ("config.json", lambda path, _: path.write_text("{}")),
        ("model.safetensors.index.json", lambda path, _: path.write_text("{}")),
        ("sub/tokenizer.json", lambda path, _: (path.parent.mkdir(), path.write_text("{}"))),
        ("sub", lambda path, _: path.write_text("mine")),
        ("sub", lambda path, elsewhere: path.symlink_to(elsewhere.parent)),
    ],
)
def test_what_comes_in_mid_run_is_not_replaced(
    source, tmp_path, in_mid_run, monkeypatch, name, make, links
):
    """Nor is anything written through it; out of the way, the same command goes on."""
    (source / "sub").mkdir()
    (source / "sub" / "tokenizer.json").write_text("[1]")
    assert convert_here(source, tmp_path / "whole").returncode == 0
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere" / "file"
    elsewhere.parent.mkdir()
    elsewhere.write_text("mine")
    shards = [shard.name for shard in moe_ckpt.make_plan(source, **SHARDS).shards]
    path = out / (shards[-1] if name == "last shard" else name)
    if not links:  # as on file systems without them

        def refuse(*_):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    in_mid_run(lambda: make(path, elsewhere))
    done = convert_here(source, out)
    assert done.returncode == 4, done.stderr
    (error,) = errors_of(done)
    assert f"{path.relative_to(out)} was put there while the conversion ran" in error
    assert elsewhere.read_text() == "mine"
    assert [p.name for p in elsewhere.parent.iterdir()] == ["file"]
    assert path.is_symlink() or path.is_dir() or path.read_text() in ("mine", "{}")
    stay = len(list(out.glob("*.safetensors")))
    assert stay >= len(shards) - 1

    path.rename(tmp_path / "moved")
    again = run_here("convert", source, out, "--max-shard-size", "30000")
    assert again.returncode == 0, again.stderr
    assert "going on: " in again.stderr
    assert tree(out) == tree(tmp_path / "whole")


def test_what_comes_at_the_last_moment_is_not_ours(source, tmp_path, monkeypatch):
    """Between the record and the name: were it still recorded, the next run would remove it."""
    out, real = tmp_path / "out", os.link
    name = [shard.name for shard in moe_ckpt.make_plan(source, **SHARDS).shards][2]

    def link(partial, final):
        if final == out / name:
            final.write_text("mine")
        real(partial, final)

    monkeypatch.setattr(os, "link", link)
    done = convert_here(source, out)
    assert (done.returncode, f"{name} was put there" in done.stderr) == (4, True)
    assert name not in read_journal(out).records
    before = tree(out)
    for _ in range(2):
        assert convert_here(source, out).returncode == 4
        assert tree(out) == before
    assert before[name] == b"mine"


LOSSES = {
    "removed": lambda journal: journal.unlink(),
    "cut": lambda journal: os.truncate(journal, 0),
    "another text": lambda journal: journal.write_text("{}\n"),
    "a FIFO": lambda journal: (journal.unlink(), os.mkfifo(journal)),
    "its folder removed": lambda journal: shutil.rmtree(journal.parent),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_journal_that_is_lost_in_mid_run_is_noticed_and_written_anew(
    source, tmp_path, whole, in_mid_run, lose
):
    out = tmp_path / "out"
    in_mid_run(lambda: lose(out / ".moe-ckpt" / "journal.jsonl"))
    done = convert_here(source, out)
    assert done.returncode == 5, done.stderr
    (error,) = errors_of(done)
    assert "journal.jsonl: was removed or changed while the conversion ran; nothing that" in error
    stay = {path.name for path in out.glob("*.safetensors")}
    assert 1 <= len(stay) <= 2
    assert read_journal(out).records.keys() == stay
    result = moe_ckpt.convert(source, out, **SHARDS)
    assert result.resumed == len(stay)
    assert tree(out) == whole


# The output's disk.


def test_a_full_disk(tmp_path):
    """On a real file system that is full: it says how much is missing, and goes on."""
    script = """
import sys, moe_ckpt, pathlib
from moe_ckpt.errors import EnvironmentFaultError
source, disk = sys.argv[1:]
options = dict(max_shard_size=30_000)
out, filler = pathlib.Path(disk, "out"), pathlib.Path(disk, "filler")
nbytes = moe_ckpt.make_plan(source, **options).write_nbytes
try:
    pathlib.Path(disk, "big").write_bytes(bytes(1_024_000 - nbytes // 2))
    moe_ckpt.convert(source, out, **options)
    raise SystemExit("not refused")
except EnvironmentFaultError as error:
    assert "bytes more than the disk has free; nothing was written" in str(error), error
    assert not out.exists()
pathlib.Path(disk, "big").unlink()
def fill(nbytes, shard):
    if shard is not None and not filler.exists():
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            except OSError:
                pass
try:
    moe_ckpt.convert(source, out, progress=fill, **options)
    raise SystemExit("not full")
except EnvironmentFaultError as error:
    assert "No space left on device" in str(error), error
    assert "bytes are missing; free space and run the same command again" in str(error), error
kept = len(list(out.glob("*.safetensors")))
assert kept >= 1 and not (out / "config.json").exists()
assert not list((out / ".moe-ckpt").glob("*.partial"))
filler.unlink()
result = moe_ckpt.convert(source, out, **options)
assert result.resumed == kept, result.resumed
moe_ckpt.convert(source, sys.argv[2] + "-whole", **options)
sys.path.insert(0, sys.argv[0])
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "script.py").write_text(script)
    line = (
        f"mount -t tmpfs -o size=1000k tmpfs {disk} && "
        f"{sys.executable} {tmp_path}/script.py {SOURCE} {disk} && cp -r {disk}/out {tmp_path}/"
    )
    args = ["unshare", "--map-root-user", "--mount", "bash", "-c", line]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no small file system can be made here")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "disk-whole")


def test_a_file_size_limit_is_known_before(tmp_path):
    limited = f"ulimit -f 100; exec {COMMAND} convert {SOURCE} {tmp_path}/out"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "may write files of 102,400 (ulimit -f)" in done.stderr
    assert "--max-shard-size" in done.stderr
    assert not (tmp_path / "out").exists()
    smaller = f"{limited} --max-shard-size 30KB"
    assert subprocess.run(["bash", "-c", smaller], capture_output=True, check=False).returncode == 0


# Two at once.


@pytest.mark.slow
def test_a_second_conversion_is_told_who_is_first(slow_model, tmp_path):
    out = tmp_path / "out"
    args = [COMMAND, "convert", slow_model, out, "--max-shard-size", "40MB", "-q"]
    with subprocess.Popen(args) as first:
        wait_for_a_shard(first, out)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(args, capture_output=True, text=True, check=False)
        third = subprocess.run([*args, "--overwrite"], capture_output=True, text=True, check=False)
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    for refused in (second, third):
        assert refused.returncode == 4
        assert f"is in use by process {first.pid} on host {os.uname().nodename} since" in (
            refused.stderr
        )
    assert (out / "config.json").exists()
    assert [path.name for path in (out / ".moe-ckpt").iterdir()] == ["journal.jsonl"]


@pytest.mark.slow
def test_the_lock_of_the_dead_is_free(slow_model, tmp_path):
    out = tmp_path / "out"
    args = [COMMAND, "convert", slow_model, out, "--max-shard-size", "40MB", "-q"]
    with subprocess.Popen(args) as first:
        wait_for_a_shard(first, out)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -9
    assert (out / ".moe-ckpt" / "owner.json").exists()
    assert subprocess.run(args, check=False).returncode == 0
    assert [path.name for path in (out / ".moe-ckpt").iterdir()] == ["journal.jsonl"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupt_while_modules_are_imported(number, code):
    script = f"""
import os, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "moe_ckpt.cli.process":
            os.kill(os.getpid(), {int(number)})

sys.meta_path.insert(0, Interrupt())
from moe_ckpt.__main__ import main
main()
"""
    args = [sys.executable, "-c", script]
    start = partial(signal.signal, number, signal.SIG_DFL)  # under nohup it would be ignored
    done = subprocess.run(args, capture_output=True, text=True, check=False, preexec_fn=start)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_dry_run_knows_what_would_be_refused(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out)
    args = ("convert", source, out, "--dry-run", "--max-shard-size")
    before = tree(out)
    assert run_cli(*args, "30000").returncode == 0
    other = run_cli(*args, "70000")
    assert other.returncode == 4
    assert "--max-shard-size was 30000 and is 70000 now" in other.stderr
    assert tree(out) == before


def test_a_result_that_is_wrong_gets_no_configuration(source, tmp_path, whole):
    """A scale that is no number on its way to the disk; --no-verify takes it all the same."""
    from moe_ckpt.output.writer import ShardWriter

    real = ShardWriter.write
    plan = moe_ckpt.make_plan(source, **SHARDS)
    name = "model.layers.0.mlp.experts.3.down_proj.weight_scale_2"
    shard = next(s for s in plan.shards if any(t.name == name for t in s.tensors))
    offset = 0
    for tensor in shard.tensors:
        if tensor.name == name:
            break
        offset += tensor.nbytes

    def write(self, start, data):
        real(self, start, data)
        if self.shard == shard and start <= offset < start + data.nbytes:
            real(self, offset, memoryview(struct.pack("<f", float("nan"))))

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        with pytest.raises(VerifyError, match=name.replace(".", r"\.")) as caught:
            moe_ckpt.convert(source, out, **SHARDS)
    assert caught.value.exit_code == 6
    assert not (out / "config.json").exists()
    assert not (out / "hf_quant_config.json").exists()
    assert not list(out.glob("*.index.json"))
    again = run_cli("convert", source, out, "--max-shard-size", "30000")
    assert again.returncode == 6
    assert "--no-verify" in again.stderr
    forced = run_cli("convert", source, out, "--max-shard-size", "30000", "--no-verify")
    assert forced.returncode == 0
    assert (out / "config.json").exists()
    assert tree(out).keys() == whole.keys()
    found = run_cli("verify", out)
    assert found.returncode == 6
    assert name in found.stderr
