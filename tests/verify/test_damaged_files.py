"""Shards, indexes and journals that are missing, damaged or of another output: what is found."""

from __future__ import annotations

import os
import shutil

import pytest
from kit.tampering import (
    INDEX,
    copy,
    edit_json,
    shard_of,
    tensors_of,
    write_shard,
)
from kit.verified import LAYER, NVFP4, UP, converted, one

from moe_ckpt.verify import Findings, check_parts, verify
from moe_ckpt.verify.subject import open_subject


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of many shards that has no journal."""
    out = converted(tmp_path_factory.mktemp("sharded"), "qwen3_moe", "nvfp4", max_shard_size="60KB")
    shutil.rmtree(out / ".moe-ckpt")
    assert verify(out).found == []
    return out


def test_a_missing_shard_is_found_once(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    shard.unlink()
    found = verify(folder).found
    assert {finding.where for finding in found} == {shard.name}
    assert "shard is missing" in found[0].problem
    assert "tensors by the index" in found[1].problem


def test_a_damaged_header_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    data = bytearray(shard.read_bytes())
    data[9] ^= 0xFF
    shard.write_bytes(data)
    assert "is not UTF-8" in one(verify(folder), shard.name).problem


def test_a_shard_that_was_cut_short_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    os.truncate(shard, shard.stat().st_size - 1)
    assert "download it again" in one(verify(folder), shard.name).problem


def test_an_extra_shard_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    extra = folder / "model-00099-of-00099.safetensors"
    shutil.copy(min(folder.glob("*.safetensors")), extra)
    assert f"{INDEX} does not name" in one(verify(folder), extra.name).problem


def test_a_stale_single_file_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shutil.copy(NVFP4 / "model.safetensors", folder)
    assert f"{INDEX} does not name" in one(verify(folder), "model.safetensors").problem


@pytest.mark.parametrize(
    ("edit", "where", "text"),
    [
        (lambda i: i["weight_map"].pop(f"{UP}.weight"), f"{UP}.weight", "does not name it"),
        (
            lambda i: i["weight_map"].update({f"{UP}.weight_scale_9": next(iter(shards(i)))}),
            f"{UP}.weight_scale_9",
            "is not in",
        ),
        (lambda i: i["weight_map"].update({f"{UP}.weight": "a/b.bin"}), INDEX, "a/b.bin"),
        (lambda i: i["weight_map"].update({f"{UP}.weight": 3}), INDEX, f'"{UP}.weight"'),
        (lambda i: i.update(weight_map=[]), INDEX, "must be an object"),
        (lambda i: i.pop("metadata"), INDEX, '"metadata"'),
        (lambda i: i["metadata"].update(total_size=1), INDEX, "total_size is 1"),
    ],
)
def test_an_edited_index_is_found(tmp_path, sharded, edit, where, text):
    folder = copy(sharded, tmp_path)
    edit_json(folder / INDEX, edit)
    assert text in one(verify(folder), where).problem


def shards(index):
    return set(index["weight_map"].values())


def test_tensors_in_other_shards_than_the_index_says_are_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    here = shard_of(folder, f"{UP}.weight")
    there = next(path for path in sorted(folder.glob("*.safetensors")) if path != here)
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({f"{UP}.weight": there.name}))
    assert f"is in {here.name}" in one(verify(folder), f"{UP}.weight").problem
    tensors = tensors_of(here)
    write_shard(there, tensors_of(there) | {f"{UP}.weight": tensors[f"{UP}.weight"]})
    assert "is in two shards" in one(verify(folder), f"{UP}.weight").problem


def test_a_missing_index_is_found(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    (folder / INDEX).unlink()
    assert "is missing" in one(verify(folder), INDEX).problem


@pytest.mark.parametrize("name", [INDEX, "config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_files_that_are_not_json_are_found(tmp_path, sharded, name, text):
    folder = copy(sharded, tmp_path)
    (folder / name).write_text(text)
    assert one(verify(folder), name).part == "structure"


def test_a_fifo_is_found_and_not_read(tmp_path, sharded):
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, f"{UP}.weight")
    shard.unlink()
    os.mkfifo(shard)
    assert "not a regular file" in one(verify(folder), shard.name).problem


def test_a_conversion_that_was_not_finished_is_told_of(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4", max_shard_size="60KB")
    (out / "config.json").unlink()
    (out / INDEX).unlink()
    assert "conversion to this folder was not finished" in one(verify(out), "config.json").problem
    assert one(verify(out), INDEX)


def test_bytes_that_changed_after_a_conversion_are_found(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    found = one(verify(out), "model.safetensors")
    assert "has SHA-256" in found.problem
    findings = Findings()
    check_parts(open_subject(out, findings), findings)
    assert findings.is_clean  # sizes are the same, and weights are not read
    (out / "generation_config.json").write_text("{}\n")
    assert "has 3 bytes" in one(verify(out), "generation_config.json").problem
    (out / "generation_config.json").unlink()
    assert "is missing" in one(verify(out), "generation_config.json").problem


def test_a_damaged_journal_is_found(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4")
    (out / ".moe-ckpt" / "journal.jsonl").write_text("no journal\n")
    assert "is damaged" in one(verify(out), ".moe-ckpt/journal.jsonl").problem


def test_files_that_are_not_written_yet_can_be_given(tmp_path):
    """A conversion checks itself before it publishes what makes its output a model."""
    out = converted(tmp_path, "qwen3_moe", "nvfp4", max_shard_size="60KB")
    names = ("config.json", "hf_quant_config.json", INDEX)
    texts = {name: (out / name).read_text() for name in names}
    for name in names:
        (out / name).unlink()
    shutil.rmtree(out / ".moe-ckpt")
    findings = Findings()
    check_parts(open_subject(out, findings, texts), findings)
    assert findings.found == []
    assert findings.counts["matrices in nvfp4"] == 48
    texts["config.json"] = texts["config.json"].replace(
        '"num_local_experts": 8', '"num_local_experts": 9'
    )
    findings = Findings()
    check_parts(open_subject(out, findings, texts), findings)
    assert "is missing; the layer has 9 experts" in one(findings, f"{LAYER}.8.up_proj").problem


def test_a_configuration_that_says_nothing_is_an_error(tmp_path):
    folder = copy(NVFP4, tmp_path)
    (folder / "config.json").write_text("{}")
    found = [finding for finding in verify(folder).found if finding.problem == "is empty"]
    assert [finding.where for finding in found] == ["config.json"]
