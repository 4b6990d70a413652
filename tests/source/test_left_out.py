"""Files beside the shards: what is copied whole, what is left out, and who says so."""

from __future__ import annotations

import json
import shutil

import pytest
from kit.command import run_here
from kit.files import FIXTURES, read_files, write_headers
from kit.tampering import INDEX, edit_json, tensors_of, write_shard

SOURCE = FIXTURES / "qwen3_moe" / "source"


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(SOURCE, tmp_path / "in")


def convert(source, *args):
    return run_here("convert", source, source.parent / "out", "--format", "fp8-channel", *args)


def nested(folder, name="model.safetensors"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(b"weights")
    return folder


def test_a_nested_checkpoint_is_copied_whole(source):
    nested(source / "draft")
    nested(source / "draft" / "deeper", "pytorch.txt")
    made = convert(source)
    out = source.parent / "out"
    assert (made.returncode, "draft" in made.stderr) == (0, False)
    inside = read_files(source / "draft")
    assert len(inside) == 4
    assert read_files(out / "draft") == inside
    (out / "draft" / "model.safetensors").unlink()
    found = run_here("verify", out, "--source", source)
    assert found.returncode == 6
    assert "draft/model.safetensors: is missing" in found.stdout + found.stderr


@pytest.mark.parametrize("half", ["pytorch_model.bin", "link"])
def test_a_nested_checkpoint_that_cannot_be_whole_is_left_out_and_named(source, half, tmp_path):
    nested(source / "draft")
    if half == "link":
        (tmp_path / "elsewhere").write_text("")
        (source / "draft" / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    else:
        (source / "draft" / half).write_bytes(b"")
    made = convert(source)
    assert "Left out  draft/\n" in made.stderr
    assert not (source.parent / "out" / "draft").exists()
    found = run_here("verify", source.parent / "out", "--source", source)
    assert (found.returncode, "Left out  draft/\n" in found.stderr + found.stdout) == (0, True)


def test_what_is_left_out_is_in_the_documents(source):
    (source / "pytorch_model.bin").write_bytes(b"")
    (source / "original").mkdir()
    wanted = ["original/", "pytorch_model.bin"]
    made = convert(source, "--json")
    assert json.loads(made.stdout)["output"]["left_out"] == wanted
    found = run_here("verify", source.parent / "out", "--source", source, "--json")
    assert json.loads(found.stdout)["left_out"] == wanted
    assert "Left out  original/, pytorch_model.bin" in convert(source).stderr  # complete already


def beside_the_index(source, *names):
    """A shard that the index does not name, with copies of a tensor under these names."""
    tensor = tensors_of(next(source.glob("*.safetensors")))
    write_shard(source / "mtp.safetensors", dict.fromkeys(names, next(iter(tensor.values()))))


@pytest.mark.parametrize("name", ["mtp.layers.0.enorm.weight", "model.layers.2.eh_proj.weight"])
def test_layers_for_mtp_beside_the_index_are_carried_over(source, name):
    beside_the_index(source, name)
    edit_json(source / "config.json", lambda c: c.update(num_nextn_predict_layers=1))
    made = convert(source, "--max-shard-size", "100KB")
    out = source.parent / "out"
    assert made.returncode == 0
    assert "carried over, though the index does not name it: mtp.safetensors" in made.stderr
    assert name in json.loads((out / INDEX).read_text())["weight_map"]
    assert run_here("verify", out, "--source", source).returncode == 0


def test_layers_for_mtp_among_others_beside_the_index_are_refused(source):
    beside_the_index(source, "mtp.layers.0.enorm.weight", "model.other.weight")
    made = convert(source)
    assert made.returncode == 3
    assert "mtp.safetensors: holds layers for multi-token prediction" in made.stderr


def test_other_shards_beside_the_index_are_left_out_with_a_warning(source):
    beside_the_index(source, "model.other.weight")
    made = convert(source)
    assert made.returncode == 0
    assert "left out, the index does not name it: mtp.safetensors" in made.stderr
    assert "Left out  mtp.safetensors" in made.stderr


def test_a_shard_of_nothing_beside_the_index(source):
    write_headers(source, {"mtp.safetensors": {}}, json.loads((source / "config.json").read_text()))
    assert "left out, the index does not name it" in convert(source).stderr
