"""The output folder: whose files it may hold, what is copied, what an error leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from kit.command import run_cli
from kit.files import FIXTURES, read_files
from safetensors.torch import load_file, save_file

import moe_ckpt
from moe_ckpt.engines import backend_for
from moe_ckpt.errors import CheckpointError, EnvironmentFaultError, OutputRefusedError

SOURCE = FIXTURES / "qwen3_moe" / "source"


@pytest.fixture
def source(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "in")
    return tmp_path / "in"


def refused(source, out, text, **options):
    before = read_files(source), read_files(Path(out)) if Path(out).is_dir() else None
    with pytest.raises(OutputRefusedError, match=text):
        moe_ckpt.convert(source, out, **options)
    assert (read_files(source), read_files(Path(out)) if Path(out).is_dir() else None) == before


def test_overlaps_are_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path, source / ".." / "in", tmp_path / "link"):
        refused(source, out, "overlaps")
        refused(source, out, "overlaps", overwrite=True)


def test_a_hub_caches_own_files_are_not_written_to(source, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    refused(snapshot, blobs / "out", "overlaps")
    moe_ckpt.convert(snapshot, tmp_path / "hub" / "out")


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000 + "\n", "{\n", '{"files": 7}\n', "", "[]\n", "\0" * 50, None),
        '{"schema": "moe-ckpt/journal", "version": 2}\n',
        '{"schema": "moe-ckpt/journal", "version": 1, "plan": "", "content": 1, "origin": 7}\n',
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_journal_makes_the_files_foreign(source, tmp_path, text, overwrite):
    out = tmp_path / "out"
    moe_ckpt.convert(source, out)
    journal = out / ".moe-ckpt" / "journal.jsonl"
    journal.unlink()
    os.mkfifo(journal) if text is None else journal.write_text(text)
    refused(source, out, r"journal\.jsonl: ", overwrite=overwrite)


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/../../mine", "a//b", ".", ""])
def test_a_journal_cannot_name_files_outside(source, tmp_path, name):
    out = tmp_path / "out"
    moe_ckpt.convert(source, out)
    (tmp_path / "mine").write_text("mine")
    with (out / ".moe-ckpt" / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"file": name, "nbytes": 4, "sha256": ""}) + "\n")
    refused(source, out, "wrong types", overwrite=True)
    assert (tmp_path / "mine").exists()


def test_an_empty_folder_is_taken(source, tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    moe_ckpt.convert(source, tmp_path / "out")


def test_foreign_files_are_refused_and_stay(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(source, out, "is not empty")
    refused(source, out, "is not empty", overwrite=True)
    refused(source, out / "notes.txt", "is not a folder")


def test_overwrite_replaces_what_we_wrote_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    moe_ckpt.convert(source, out, max_shard_size=50_000)
    refused(source, out, "--overwrite")
    moe_ckpt.convert(source, out, overwrite=True)
    moe_ckpt.convert(source, tmp_path / "fresh")
    assert read_files(out) == read_files(tmp_path / "fresh")

    (out / "notes.txt").write_text("mine")
    refused(source, out, "did not write: notes.txt", overwrite=True)


def test_an_interrupted_overwrite_can_be_repeated(source, tmp_path, monkeypatch):
    """Whatever the removal of the earlier output reaches, the rest is still known as ours."""
    out = tmp_path / "out"
    moe_ckpt.convert(source, out, max_shard_size=50_000)
    whole = read_files(out)
    real, left = Path.unlink, 0

    def unlink(path, *args, **kwargs):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return real(path, *args, **kwargs)

    for count in range(len(whole)):
        left = count
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                moe_ckpt.convert(source, out, overwrite=True, max_shard_size=50_000)
        assert not count or "config.json" not in read_files(out)
        moe_ckpt.convert(source, out, overwrite=True, max_shard_size=50_000)
        assert read_files(out) == whole


def test_a_bad_input_does_not_cost_the_earlier_output(source, tmp_path):
    out = tmp_path / "out"
    moe_ckpt.convert(source, out)
    before = read_files(out)
    (source / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        moe_ckpt.convert(source, out, overwrite=True)
    assert read_files(out) == before


def test_side_files_are_copied_and_other_weights_are_not(source, tmp_path):
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tool.jinja").write_text("{{ x }}")
    (source / "modeling.py").write_text("raise SystemExit('executed')")
    (source / "tokenizer.json").symlink_to(source / "chat_templates" / "tool.jinja")
    (source / ("long" * 60)).write_text("a name that leaves no room for a suffix")
    for name in ("pytorch_model.bin", "a.pt", "consolidated.00.pth", "extra.safetensors"):
        (source / name).write_bytes(b"x")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "secret").write_text("s")
    (source / "stolen.txt").symlink_to(tmp_path / "secret")
    (source / "gone.txt").symlink_to(tmp_path / "nothing")
    (source / "loop.txt").symlink_to(source / "loop.txt")
    Path(os.fsdecode(os.fsencode(source) + b"/bad\xff.txt")).write_text("not UTF-8")
    (source / ".cache").mkdir()
    (source / ".cache" / "x.lock").write_text("")
    os.mkfifo(source / "pipe")

    plan = moe_ckpt.make_plan(source)
    moe_ckpt.convert(source, tmp_path / "out")
    files = read_files(tmp_path / "out")
    assert set(files) == {
        *("model.safetensors", "config.json", "hf_quant_config.json", "generation_config.json"),
        "moe-ckpt-recipe.toml",
        *("chat_templates/tool.jinja", "modeling.py", "tokenizer.json", "long" * 60),
        os.fsdecode(b"bad\xff.txt"),
    }
    assert files["tokenizer.json"] == b"{{ x }}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    warned = "\n".join(plan.warnings)
    for name in ("stolen.txt", "gone.txt", "loop.txt", "pipe", "extra.safetensors"):
        assert name in warned


def test_a_hub_cache_snapshot_is_links(source, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(source.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    moe_ckpt.convert(snapshot, tmp_path / "a")
    moe_ckpt.convert(source, tmp_path / "b")
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")
    assert not any(path.is_symlink() for path in (tmp_path / "a").rglob("*"))


def test_files_are_readable_by_others(source, tmp_path):
    before = os.umask(0o022)
    try:
        moe_ckpt.convert(source, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == {0o644}


def test_config_keeps_its_other_keys_in_order(source, tmp_path):
    config = {
        "zeta": [1e-06, None, "ü", "\ud800"],
        "limit": float("inf"),
        "quantization_config": None,
    }
    config |= json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    moe_ckpt.convert(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("quantization_config")
    assert list(found) == [*config, "quantization_config"]
    found.pop("quantization_config")
    assert found == config


def spoil(source, name, index, value):
    """Write one value into a tensor of a fused checkpoint."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][index] = value
            save_file(tensors, path, metadata={"format": "pt"})


FUSED, SPLIT = "model.layers.1.mlp.experts.", "model.layers.1.mlp.experts.5."
ATTENTION = "model.layers.0.self_attn."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("form", "name", "index", "where"),
    [
        ("source", FUSED + "gate_up_proj", (5, 3, 7), r"gate_up_proj\[expert 5\].*row 3, column 7"),
        ("source", FUSED + "gate_up_proj", (7, 95, 63), r"\[expert 7\].*row 95, column 63"),
        ("source", FUSED + "down_proj", (0, 0, 0), r"down_proj\[expert 0\].*row 0, column 0"),
        ("hub", SPLIT + "gate_proj.weight", (2, 1), r"5\.gate_proj\.weight: .*row 2, column 1"),
        ("hub", SPLIT + "up_proj.weight", (0, 5), r"5\.up_proj\.weight: .*row 0, column 5"),
        ("hub", ATTENTION + "v_proj.weight", (4, 9), r"v_proj\.weight: .*row 4, column 9"),
    ],
)
def test_weights_that_are_not_numbers_are_named(tmp_path, form, name, index, where, value):
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "qwen3_moe" / form, source)
    spoil(source, name, index, value)
    with pytest.raises(CheckpointError, match=r"^model-0000.-of-0000.\.safetensors: .*" + where):
        moe_ckpt.convert(source, tmp_path / "out", quantize="linear")
    assert not (tmp_path / "out").exists()


def test_not_a_number_outside_the_experts_is_copied(source, tmp_path):
    spoil(source, "lm_head.weight", (0, 0), float("nan"))
    moe_ckpt.convert(source, tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert head.isnan().sum() == 1


def test_an_expert_of_zeros_is_converted(source, tmp_path):
    for name in ("gate_up_proj", "down_proj"):
        spoil(source, f"model.layers.0.mlp.experts.{name}", 2, 0)
    moe_ckpt.convert(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for projection in ("gate", "up", "down"):
        prefix = f"model.layers.0.mlp.experts.2.{projection}_proj"
        assert tensors[f"{prefix}.weight_scale_2"] == 1
        assert (tensors[f"{prefix}.weight_scale"].float() == 1).all()
        assert (tensors[f"{prefix}.weight"] == 0).all()


def test_a_shard_that_changes_after_planning_is_noticed(source, tmp_path):
    from moe_ckpt.conversion import execute

    plan = moe_ckpt.make_plan(source)
    path = next(source.glob("*.safetensors"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(EnvironmentFaultError, match=path.name):
        execute(plan, tmp_path / "out", backend=backend_for("cpu"))
    assert not (tmp_path / "out").exists()


def test_a_read_only_parent_is_an_environment_fault(source, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(EnvironmentFaultError, match="Permission denied"):
        moe_ckpt.convert(source, tmp_path / "locked" / "out")


def test_a_file_size_limit_leaves_nothing(source, tmp_path):
    import resource

    out = tmp_path / "out"
    done = run_cli_limited(source, out, resource.RLIMIT_FSIZE, 100_000)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def run_cli_limited(source, out, limit, value):
    import subprocess
    import sys

    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit({limit}, ({value}, {value}));"
        "sys.argv[0] = 'moe-ckpt'; from moe_ckpt.cli.process import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "convert", str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path):
    from kit.files import write_headers

    E, I, H = 4, 1 << 19, 1 << 19
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [E, 2 * I, H]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [E, H, I]),
    }
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H}
    try:
        source = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    except OSError:
        pytest.skip("this file system has no sparse files of 7 TB")
    done = run_cli("convert", source, tmp_path / "out")
    assert done.returncode == 5
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "out").exists()
