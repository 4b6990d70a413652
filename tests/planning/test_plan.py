"""The plan as a value: every source byte is read once, every output byte written once."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.files import FIXTURES, write_headers

import moe_ckpt
from moe_ckpt.errors import FormatError, LayoutError, UsageError
from moe_ckpt.planning import shards as packing
from moe_ckpt.texts import header_of, index_of

SOURCE = FIXTURES / "deepseek_v3" / "source"


@st.composite
def checkpoints(draw):
    """(shards, config) of a fused or split model with attention, spread over shards."""
    E, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    I, H = (16 * draw(st.integers(1, 4)) for _ in range(2))
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    tensors = {"lm_head.weight": (dtype, [8, H]), "model.steps": ("I64", [])}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.mlp.gate.weight"] = (dtype, [E, H])
        for p in "qkvo":
            tensors[f"{prefix}.self_attn.{p}_proj.weight"] = (dtype, [H, H])
        if draw(st.booleans()):
            tensors[f"{prefix}.mlp.experts.gate_up_proj"] = (dtype, [E, 2 * I, H])
            tensors[f"{prefix}.mlp.experts.down_proj"] = (dtype, [E, H, I])
        else:
            for e in range(E):
                for p, shape in (("gate", [I, H]), ("up", [I, H]), ("down", [H, I])):
                    tensors[f"{prefix}.mlp.experts.{e}.{p}_proj.weight"] = (dtype, shape)
    count = draw(st.integers(1, 4))
    shards: dict[str, dict] = {f"m{n}.safetensors": {} for n in range(count)}
    for name, info in tensors.items():
        shards[f"m{draw(st.integers(0, count - 1))}.safetensors"][name] = info
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H, "num_hidden_layers": layers}
    return {file: found for file, found in shards.items() if found}, config


@given(
    checkpoints(),
    st.sampled_from(["nvfp4", "nvfp4-w4a16"]),
    st.sampled_from(["experts", "linear"]),
    st.integers(1, 60_000),
)
def test_every_byte_has_one_place(tmp_path_factory, made, number_format, quantize, limit):
    folder = write_headers(tmp_path_factory.mktemp("plan"), *made)
    plan = moe_ckpt.make_plan(folder, format=number_format, quantize=quantize, max_shard_size=limit)
    reads: dict[str, list[tuple[int, int]]] = {shard.name: [] for shard in plan.source_shards}
    names: list[str] = []
    for shard in plan.shards:
        written = [(c.offset, c.read.nbytes) for c in shard.copies]
        for copy in shard.copies:
            reads[copy.read.shard].append((copy.read.offset, copy.read.nbytes))
        for job in shard.jobs:
            written += [(r.offset, r.slab_nbytes * len(job.outputs)) for r in job.regions]
            for slab in job.place.slabs:
                assert sum(read.nbytes for (read,) in slab.reads) == job.place.slab_nbytes
                for (read,) in slab.reads:
                    reads[read.shard].append((read.offset, read.nbytes))
        assert covers(written, 0) == shard.data_nbytes == sum(t.nbytes for t in shard.tensors)
        header = header_of(shard.tensors)
        assert (len(header), len(header) % 8) == (shard.header_nbytes, 0)
        names += [tensor.name for tensor in shard.tensors]
    assert len(names) == len(set(names))
    for source in plan.source_shards:
        start = source.nbytes - sum(nbytes for _, nbytes in reads[source.name])
        assert covers(reads[source.name], start) == source.nbytes
    index = index_of(plan)
    if index is None:
        assert [shard.name for shard in plan.shards] == ["model.safetensors"]
    else:
        found = json.loads(index)
        assert sorted(found["weight_map"]) == sorted(names)
        assert found["metadata"]["total_size"] == plan.tensors_nbytes
    assert plan.read_nbytes == plan.source_nbytes


def covers(ranges, position):
    """The end of ranges that follow each other from a position without hole or overlap."""
    for start, nbytes in sorted(r for r in ranges if r[1]):
        assert start == position
        position += nbytes
    return position


def test_digest_changes_with_what_decides_a_byte_and_nothing_else(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "moved")
    stats = [FIXTURES / "deepseek_v3" / "stats.json"]
    base = moe_ckpt.make_plan(SOURCE).digest()
    assert moe_ckpt.make_plan(tmp_path / "moved").digest() == base
    others = [
        moe_ckpt.make_plan(SOURCE, stats=stats),
        moe_ckpt.make_plan(SOURCE, format="nvfp4-w4a16"),
        moe_ckpt.make_plan(SOURCE, quantize="linear"),
        moe_ckpt.make_plan(SOURCE, max_shard_size="50KB"),
    ]
    assert len({base, *(plan.digest() for plan in others)}) == 5


def test_a_large_piece_gets_a_shard_of_its_own():
    plan = moe_ckpt.make_plan(SOURCE, max_shard_size=20_000)
    for shard in plan.shards:
        pieces = len(shard.copies) + sum(len(job.outputs) for job in shard.jobs)
        assert shard.data_nbytes <= 20_000 or pieces == 1


def test_columns_that_do_not_divide_are_all_named(tmp_path):
    config = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 24}
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 48, 64]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [2, 64, 24]),
        "model.layers.0.self_attn.o_proj.weight": ("BF16", [64, 40]),
    }
    folder = write_headers(tmp_path, {"model.safetensors": tensors}, config | {"hidden_size": 64})
    with pytest.raises(FormatError) as caught:
        moe_ckpt.make_plan(folder, quantize="linear")
    down, o_proj = caught.value.problems
    assert down.startswith("model.layers.0.mlp.experts down_proj: has 24 columns")
    assert o_proj.startswith("model.layers.0.self_attn.o_proj.weight: has 40 columns")
    assert "multiple of 16" in down
    assert "fp8-tensor" in down


def test_a_name_that_would_be_written_twice_is_refused(tmp_path):
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 64, 64]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [2, 64, 32]),
        "model.layers.0.self_attn.q_proj.weight": ("BF16", [64, 64]),
        "model.layers.0.self_attn.q_proj.input_scale": ("F32", []),
    }
    config = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 32}
    folder = write_headers(tmp_path, {"model.safetensors": tensors}, config | {"hidden_size": 64})
    moe_ckpt.make_plan(folder)
    with pytest.raises(LayoutError, match=r"q_proj\.input_scale: would be written twice"):
        moe_ckpt.make_plan(folder, quantize="linear")


def test_linears_that_share_a_scale_must_be_alike(tmp_path):
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 64, 64]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [2, 64, 32]),
        "model.layers.0.self_attn.q_proj.weight": ("BF16", [64, 64]),
        "model.layers.0.self_attn.k_proj.weight": ("F32", [64, 64]),
    }
    config = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 32}
    folder = write_headers(tmp_path, {"model.safetensors": tensors}, config | {"hidden_size": 64})
    with pytest.raises(LayoutError, match="must share a scale"):
        moe_ckpt.make_plan(folder, quantize="linear")


@pytest.mark.parametrize("size", ["", "x", "-1GB", "0", "nan", "inf", "5 XB", "1e99GB", -5, 0.5])
def test_sizes_that_are_none(size):
    with pytest.raises(UsageError, match="5GB"):
        moe_ckpt.make_plan(SOURCE, max_shard_size=size)


def test_headers_stay_below_what_readers_allow(monkeypatch):
    """The limit is 100 MB; a smaller one shows the same with a smaller model."""
    monkeypatch.setattr(packing, "HEADER_CAP_NBYTES", 8000)
    shards = moe_ckpt.make_plan(SOURCE).shards
    assert len(shards) == 3
    assert all(shard.header_nbytes <= 8000 for shard in shards)
    monkeypatch.setattr(packing, "HEADER_CAP_NBYTES", 2000)
    wide = FIXTURES / "qwen3_moe_wide" / "source"
    shards = moe_ckpt.make_plan(wide, format="int4-g32").shards  # has tensors of shapes
    assert all(shard.header_nbytes <= 2000 for shard in shards)


@pytest.mark.parametrize("latent_last", [True, False])
@pytest.mark.parametrize(("queries", "latent"), [(128, 192), (192, 128)])
def test_blocks_may_end_in_the_last_part_of_what_runtimes_fuse(
    tmp_path, queries, latent, latent_last
):
    """q_a, then kv_a, in whatever order the file has them: DeepSeek-V3's kv_a has 576 rows."""
    parts = {"q_a_proj": queries, "kv_a_proj_with_mqa": latent}
    attention = {
        f"model.layers.0.self_attn.{name}.weight": ("BF16", [rows, 128])
        for name, rows in sorted(parts.items(), reverse=latent_last)
    }
    experts = {
        "model.layers.0.mlp.gate.weight": ("BF16", [2, 128]),
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", [2, 256, 128]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [2, 128, 128]),
    }
    config = {"model_type": "deepseek_v3", "n_routed_experts": 2, "moe_intermediate_size": 128}
    config |= {"hidden_size": 128, "num_hidden_layers": 1}
    source = write_headers(tmp_path / "in", {"m.safetensors": attention | experts}, config)
    if queries % 128:
        with pytest.raises(FormatError, match=r"q_a_proj\.weight: has 192 rows"):
            moe_ckpt.make_plan(source, format="fp8-block", quantize="linear")
    else:
        plan = moe_ckpt.make_plan(source, format="fp8-block", quantize="linear")
        assert plan.formats["fp8-block"] == 8
