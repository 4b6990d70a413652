"""Where every byte goes: position-coded weights, any chunking, any sharding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kit import expert_layouts as experts
from kit.expert_layouts import config_of, pack, position_coded, write
from kit.files import FIXTURES, read_files, read_json, read_tensors
from safetensors.torch import load_file

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.work.batches import Budget

E, I, H = 3, 32, 48


def make(folder: Path, *, form="fused", i=I, h=H, dtype=torch.bfloat16, shards=1, layers=2):
    """A checkpoint with position-coded experts; returns its per-expert matrices."""
    matrices, tensors = {}, {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp"
        for e in range(E):
            for p, (name, n, k) in enumerate((("gate", i, h), ("up", i, h), ("down", h, i))):
                matrix = position_coded(e + 5 * layer, p, n, k, dtype)
                matrices[f"{prefix}.experts.{e}.{name}_proj.weight"] = matrix
        tensors[f"{prefix}.gate.weight"] = torch.full((E, h), float(layer)).to(dtype)
        mine = [
            [matrices[f"{prefix}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            for e in range(E)
        ]
        if form == "fused" or (form == "mixed" and layer == 0):
            gate_up, down = pack("fused", "concat", mine)
            tensors[f"{prefix}.experts.gate_up_proj"] = gate_up
            tensors[f"{prefix}.experts.down_proj"] = down
    if form != "fused":
        tensors |= {k: v for k, v in matrices.items() if form == "split" or ".0.mlp" not in k}
    tensors["model.counter"] = torch.arange(3)
    tensors["model.flag"] = torch.tensor(True)
    tensors["model.none"] = torch.zeros(0, 4, dtype=dtype)
    write(folder, tensors, config_of("qwen3_moe", E, i, h, layers), shards)
    return matrices, tensors


def check(out: Path, matrices, tensors, number_format="nvfp4"):
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, matrix in matrices.items():
        module, projection, _ = name.rsplit(".", 2)
        modules.setdefault(module, {})[projection] = matrix
    expected = experts.expected_parts(modules, number_format)
    expected |= {k: v for k, v in tensors.items() if ".experts." not in k}
    experts.check(out, expected)


@pytest.mark.parametrize("form", ["fused", "split", "mixed"])
@pytest.mark.parametrize(("i", "h"), [(32, 48), (32, 64), (48, 48), (16, 16)])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_matrix_has_its_own_weights(tmp_path, form, i, h, shards):
    made = make(tmp_path / "in", form=form, i=i, h=h, shards=shards)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out", *made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types(tmp_path, dtype):
    made = make(tmp_path / "in", dtype=dtype)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out", *made)


def test_fp8_shares_the_amax_of_gate_and_up(tmp_path):
    made = make(tmp_path / "in")
    stats = tmp_path / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"x": {}}}')
    moe_ckpt.convert(
        tmp_path / "in",
        tmp_path / "out",
        format="fp8-tensor",
        stats=[stats],
        missing_stats="constant",
    )
    check(tmp_path / "out", *made, "fp8-tensor")


@pytest.mark.parametrize("form", ["fused", "split"])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(1, 1, 1),  # one row at a time, read twice
        Budget(100, 64, 2),  # a row and a bit
        Budget(1000, 100, 3),  # parts of a slab, across gate and up
        Budget(6200, 1 << 10, 2),  # one slab
        Budget(20000, 1 << 12, 4),  # several slabs
    ],
    ids=lambda b: str(b.stage_nbytes),
)
def test_no_byte_depends_on_the_budget(tmp_path, form, budget):
    make(tmp_path / "in", form=form, shards=3)
    plan = moe_ckpt.make_plan(tmp_path / "in")
    execute(plan, tmp_path / "a", backend=backend_for("cpu"))
    execute(plan, tmp_path / "b", backend=backend_for("cpu"), budget=budget)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


@pytest.mark.parametrize("size", [1, 3000, "20KB", "5GB"])
def test_sharding_moves_tensors_and_changes_none(tmp_path, size):
    made = make(tmp_path / "in", shards=2)
    plan = moe_ckpt.make_plan(tmp_path / "in", max_shard_size=size)
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", max_shard_size=size)
    check(tmp_path / "out", *made)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [shard.name for shard in plan.shards]
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.name).stat().st_size == shard.nbytes
    if len(files) > 1:
        index = read_json(tmp_path / "out" / "model.safetensors.index.json")
        tensors = read_tensors(tmp_path / "out")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(len(t.data) for t in tensors.values())
        for file in files:
            assert load_file(tmp_path / "out" / file).keys() == {
                name for name, where in index["weight_map"].items() if where == file
            }
    else:
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_an_expert_stays_in_one_shard(tmp_path):
    make(tmp_path / "in")
    plan = moe_ckpt.make_plan(tmp_path / "in", max_shard_size=8000)
    shard_of: dict[str, str] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            if ".experts." in tensor.name:
                expert = tensor.name.rpartition("_proj.")[0].rpartition(".")[0]
                assert shard_of.setdefault(expert, shard.name) == shard.name
    assert len(shard_of) == 2 * E
    assert len(set(shard_of.values())) > 2


def test_untouched_tensors_keep_their_bytes(tmp_path):
    out = tmp_path / "out"
    moe_ckpt.convert(FIXTURES / "deepseek_v3" / "source", out)
    source, found = read_tensors(FIXTURES / "deepseek_v3" / "source"), read_tensors(out)
    kept = {name for name in source if ".mlp.experts." not in name}
    assert kept
    for name in kept:
        assert found[name] == source[name]


def test_files_carry_the_format_tag_and_aligned_tensors(tmp_path):
    make(tmp_path / "in")
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    size = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4, "I64": 8}
    for entry in header.values():
        assert (8 + length + entry["data_offsets"][0]) % size[entry["dtype"]] == 0
