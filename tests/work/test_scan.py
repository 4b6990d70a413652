"""The file of weight amax: what is in it, what it saves, and whose it is."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from kit.command import run_cli, run_here
from kit.expert_layouts import load
from kit.files import FIXTURES, read_files, read_json

import moe_ckpt
from moe_ckpt import AmaxError
from moe_ckpt.work import reader

SOURCE = FIXTURES / "qwen3_moe" / "source"
STATS = FIXTURES / "qwen3_moe" / "stats.json"


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A checkpoint and its file of weight amax, made once by the command as a user runs it."""
    folder = tmp_path_factory.mktemp("scanned")
    shutil.copytree(SOURCE, folder / "in")
    done = run_cli("scan", folder / "in", "-o", folder / "amax.json")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def model(tmp_path, scanned):
    """A copy, written when the original was: the file of weight amax belongs to it as well."""
    return shutil.copytree(scanned / "in", tmp_path / "in")


@pytest.fixture
def amax(tmp_path, scanned):
    return shutil.copy(scanned / "amax.json", tmp_path / "amax.json")


def test_every_matrix_has_its_amax(model, amax):
    found = read_json(amax)["modules"]
    expected = {}
    for name, tensor in load(model).items():
        layer = name.rpartition(".")[0]
        for e, matrix in enumerate(tensor if tensor.ndim == 3 else ()):
            joined = name.endswith("gate_up_proj")
            for leaf in ("gate_proj", "up_proj") if joined else ("down_proj",):
                expected[f"{layer}.{e}.{leaf}"] = float(matrix.abs().max())
        if name.endswith(".weight") and tensor.ndim == 2:
            expected[layer] = float(tensor.abs().max())
    assert found == expected


@pytest.mark.parametrize("form", ["source", "hub"])
def test_both_forms_of_a_model_have_the_same_amax(tmp_path, form):
    run_here("scan", FIXTURES / "qwen3_moe" / form, "-o", tmp_path / "a.json")
    run_here("scan", SOURCE, "-o", tmp_path / "b.json")
    assert read_json(tmp_path / "a.json")["modules"] == read_json(tmp_path / "b.json")["modules"]


@pytest.mark.parametrize(
    ("number_format", "quantize"),
    [
        ("nvfp4", "experts"),
        ("nvfp4", "linear"),
        ("fp8-tensor", "linear"),
        ("fp8-channel", "linear"),
    ],
)
def test_bytes_are_the_same_with_and_without(tmp_path, model, amax, number_format, quantize):
    options = {"format": number_format, "quantize": quantize}
    options["stats"] = [] if number_format == "fp8-channel" else [STATS]
    moe_ckpt.convert(model, tmp_path / "one", **options)
    moe_ckpt.convert(model, tmp_path / "two", weight_amax=amax, **options)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


def test_the_amax_of_the_file_is_what_counts(tmp_path, model, amax):
    """Else the test above would also pass if the file were never looked at."""
    top = read_json(amax)
    top["modules"] = {name: 2 * value for name, value in top["modules"].items()}
    amax.write_text(json.dumps(top))
    for name, file in (("one", None), ("two", amax)):
        moe_ckpt.convert(model, tmp_path / name, weight_amax=file)
    key = "model.layers.0.mlp.experts.0.up_proj.weight_scale_2"
    one, two = (load(tmp_path / name)[key] for name in ("one", "two"))
    assert torch.equal(two, 2 * one)


def test_a_file_of_another_checkpoint_is_refused(tmp_path, model, amax):
    with pytest.raises(AmaxError, match="made from another checkpoint"):
        moe_ckpt.make_plan(FIXTURES / "mixtral" / "source", weight_amax=amax)
    shard = next(model.glob("*.safetensors"))
    os.utime(shard, (1, 1))
    with pytest.raises(AmaxError, match="its shards were written since"):
        moe_ckpt.make_plan(model, weight_amax=amax)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "moe-ckpt/stats"}, "is not weight amax"),
        ({"version": 2}, "is not weight amax of version 1"),
        ({"modules": []}, "modules must be an object"),
        ({"modules": {"m": -1}}, 'modules."m".: is -1'),
        ({"modules": {"m": True}}, "is true"),
        ({"modules": {"m": 1e300}}, "expected a float32"),
        ({"modules": {"m": 10**400}}, "expected a float32"),
        ({"modules": {"m": 0.1}}, "expected a float32"),
        ({"modules": {"m": None}}, "is null"),
    ],
)
def test_a_damaged_file_is_refused(model, amax, change, words):
    amax.write_text(json.dumps(read_json(amax) | change))
    with pytest.raises(AmaxError, match=words):
        moe_ckpt.make_plan(model, weight_amax=amax)


def test_where_the_file_may_not_be_written(tmp_path, model, amax):
    done = run_here("scan", model, "-o", amax)
    assert (done.returncode, "--overwrite" in done.stderr) == (4, True)
    assert run_here("scan", model, "-o", amax, "--overwrite").returncode == 0
    done = run_here("scan", model, "-o", model / "amax.json")
    assert (done.returncode, "lies in the input" in done.stderr) == (4, True)
    done = run_here("scan", model, "-o", tmp_path / "nowhere" / "amax.json")
    assert done.returncode == 4, done.stderr
    done = run_here("scan", model, "-o", tmp_path / ("x" * 300))
    assert (done.returncode, "File name too long" in done.stderr) == (5, True)
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is: it must not become a file
    done = run_here("scan", model, "-o", tmp_path / "pipe", "--overwrite")
    assert (done.returncode, "is not a regular file" in done.stderr) == (4, True)
    assert (tmp_path / "pipe").is_fifo()
    assert not (model / "amax.json").exists()


def test_a_file_that_comes_while_it_scans_is_not_replaced(tmp_path, model, monkeypatch):
    path, real = tmp_path / "amax.json", reader.SourceReader.check_unchanged

    def check(self):
        real(self)
        path.write_text("mine")

    monkeypatch.setattr(reader.SourceReader, "check_unchanged", check)
    done = run_here("scan", model, "-o", path)
    assert (done.returncode, "amax.json: is there already" in done.stderr) == (4, True)
    assert path.read_text() == "mine"
    assert run_here("scan", model, "-o", path, "--overwrite").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["amax.json", "in"]


def test_a_quantized_source_has_the_amax_of_what_it_stands_for(tmp_path):
    moe_ckpt.convert(SOURCE, tmp_path / "fp8", format="fp8-channel", quantize="linear")
    moe_ckpt.convert(tmp_path / "fp8", tmp_path / "bf16", format="bf16")
    run_here("scan", tmp_path / "fp8", "-o", tmp_path / "amax.json")
    decoded = load(tmp_path / "bf16")
    for name, value in read_json(tmp_path / "amax.json")["modules"].items():
        if not name.endswith(("gate_proj", "up_proj")):  # those two share theirs
            assert float(decoded[f"{name}.weight"].abs().max()) == pytest.approx(value, rel=2**-8)
