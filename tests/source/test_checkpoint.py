"""Damaged and hostile checkpoints: refused with the file and the tensor named."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.files import FIXTURES
from safetensors import SafetensorError, deserialize

import moe_ckpt
from moe_ckpt.errors import CheckpointError, MoeCkptError
from moe_ckpt.planning.planner import make_plan
from moe_ckpt.source.checkpoint import open_source
from moe_ckpt.source.headers import read_header

INDEX = "model.safetensors.index.json"


def file_of(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start=0, end=4, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = {"a": entry(), "b": entry(4, 8, (2,), "F16")}


def test_a_good_header(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"__metadata__": {"x": "y"}} | GOOD, bytes(8)))
    shard, infos = read_header(path)
    assert shard.nbytes == path.stat().st_size
    assert [(i.name, i.dtype, i.shape, i.nbytes) for i in infos] == [
        ("a", "U8", (4,), 4),
        ("b", "F16", (2,), 4),
    ]
    assert infos[1].offset == shard.nbytes - 4


DUPLICATE = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)
BAD = {
    "empty": (b"", "cut short"),
    "seven bytes": (b"1234567", "cut short"),
    "length 0": (file_of(b""), "cut short"),
    "length past the end": (file_of(b"{}", length=99), "claims 99"),
    "length 2**63": (file_of(b"{}", length=2**63), "claims"),
    "page": (b"<!DOCTYPE html><html>" * 9, "is an HTML page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "pointer of Git LFS"),
    "not JSON": (file_of(b"{nope}"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not UTF-8 text"),
    "a list": (file_of([]), "must be a JSON object"),
    "deep": (file_of(b"[" * 100_000), "nested"),
    "cut short": (file_of(GOOD, bytes(7)), "7 bytes of tensors, its header describes 8"),
    "trailing": (file_of(GOOD, bytes(9)), "9 bytes"),
    "overlap": (file_of({"a": entry(), "b": entry(3, 7)}, bytes(7)), "b: starts at byte"),
    "hole": (file_of({"a": entry(), "b": entry(5, 9)}, bytes(9)), "b: starts at byte"),
    "not from 0": (file_of({"a": entry(1, 5)}, bytes(5)), "a: starts at byte"),
    "same range twice": (file_of({"a": entry(), "b": entry()}, bytes(4)), "starts at byte"),
    "reversed": (file_of({"a": entry(4, 0)}, bytes(4)), "a: U8 [4] needs 4 bytes"),
    "shape too small": (file_of({"a": entry(shape=[3])}, bytes(4)), "needs 3 bytes"),
    "shape overflows": (file_of({"a": entry(shape=[2**62, 2**62])}, bytes(4)), "needs"),
    "shape beyond": (file_of({"a": entry(shape=[2**64])}, bytes(4)), "not a list of sizes"),
    "negative shape": (file_of({"a": entry(shape=[-4])}, bytes(4)), "not a list of sizes"),
    "text shape": (file_of({"a": {**entry(), "shape": "4"}}, bytes(4)), "not a list of sizes"),
    "true shape": (file_of({"a": entry(shape=[True])}, bytes(4)), "not a list of sizes"),
    "float offset": (file_of({"a": entry(0.0, 4.0)}, bytes(4)), "not two positions"),
    "negative offset": (file_of({"a": entry(-4, 0)}, bytes(4)), "not two positions"),
    "three offsets": (
        file_of({"a": {**entry(), "data_offsets": [0, 4, 4]}}, bytes(4)),
        "not two positions",
    ),
    "no dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)), "dtype null"),
    "new dtype": (file_of({"a": entry(dtype="F2")}, bytes(4)), 'dtype "F2" is unknown'),
    "null entry": (file_of({"a": None}), "is null"),
    "duplicate": (file_of(DUPLICATE, bytes(4)), "header: a appears twice"),
    "key twice": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8"}}'),
        'header: a["dtype"] appears twice',
    ),
    "many sizes": (file_of({"a": entry(shape=[2**62] * 9000)}, bytes(4)), "more than the 4 bytes"),
    "half a byte": (file_of({"a": entry(0, 2, (3,), "F4")}, bytes(2)), "needs 1.5 bytes"),
    "metadata": (file_of({"__metadata__": 7} | GOOD, bytes(8)), "__metadata__ must map text"),
    "nested metadata": (file_of({"__metadata__": {"a": {}}} | GOOD, bytes(8)), "__metadata__"),
    "surrogate": (file_of(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), bytes(4)), "Unicode"),
}


@pytest.mark.parametrize(("data", "text"), BAD.values(), ids=BAD.keys())
def test_bad_headers(tmp_path, data, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: ") as caught:
        read_header(path)
    assert text in str(caught.value)


@given(st.binary(max_size=40), st.integers(0, 200))
def test_what_we_accept_the_library_accepts(tmp_path_factory, noise, position):
    """Any edit of a good file is refused by us, or read alike by the safetensors library."""
    data = bytearray(file_of(GOOD, bytes(8)))
    data[position : position + len(noise)] = noise
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    try:
        _, infos = read_header(path)
    except CheckpointError:
        return
    try:
        theirs = dict(deserialize(bytes(data)))
    except SafetensorError as error:
        raise AssertionError(data) from error
    assert {i.name: list(i.shape) for i in infos} == {k: v["shape"] for k, v in theirs.items()}


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling", "loop", "device"])
def test_what_is_not_a_regular_file(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("nothing"),
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: "):
        read_header(path)


@pytest.fixture
def source(tmp_path):
    shutil.copytree(FIXTURES / "qwen3_moe" / "source", tmp_path / "in")
    return tmp_path / "in"


def edit_index(source, change):
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def refusal(source):
    with pytest.raises(CheckpointError) as caught:
        open_source(source)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "a/x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin"),
        *("C:x.safetensors", "x\0.safetensors", "", ".", "x" * 300 + ".safetensors", 7, None),
    ],
)
def test_shard_names_stay_in_the_folder(source, name):
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    assert 'weight_map["model.norm.weight"]' in refusal(source)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"weight_map": []}', '{"weight_map": {}}', "{}"]
)
def test_bad_indexes(source, text):
    (source / INDEX).write_text(text)
    assert INDEX in refusal(source)


def test_index_and_shards_must_agree(source):
    edit_index(source, lambda weight_map: weight_map.update(new="model-00001-of-00006.safetensors"))
    assert "new: is not in model-00001-of-00006" in refusal(source)


def test_a_tensor_in_another_shard(source):
    name = "model-00001-of-00006.safetensors"
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    assert f"model.norm.weight: is in model-00005-of-00006.safetensors, not in {name}" in refusal(
        source
    )


OVERLAY, BASE = "model-overlay.safetensors", "model-00005-of-00006.safetensors"


def overlaid(source):
    """The last norm once more, in a shard with other bytes and a tensor of its own."""
    head = split(source / BASE)[0]["model.norm.weight"]
    nbytes = head["data_offsets"][1] - head["data_offsets"][0]
    header = {
        "model.norm.weight": head | {"data_offsets": [0, nbytes]},
        "extra": entry(nbytes, nbytes + 4),
    }
    (source / OVERLAY).write_bytes(file_of(header, b"\1" * (nbytes + 4)))


def split(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, raw[8 + length :]


@pytest.mark.parametrize("counts", [OVERLAY, BASE])
def test_the_index_decides_over_stale_copies(source, tmp_path, counts):
    overlaid(source)
    edit_index(source, lambda where: where.update({"model.norm.weight": counts, "extra": OVERLAY}))
    found = open_source(source)
    assert found.tensors["model.norm.weight"].shard == counts
    stale = ({OVERLAY, BASE} - {counts}).pop()
    (warning,) = found.warnings
    assert warning.endswith(f"names another shard that has it: model.norm.weight in {stale}")
    assert warning in make_plan(source, format="bf16").warnings
    moe_ckpt.convert(source, tmp_path / "out", format="bf16", device="cpu")
    header, data = split(tmp_path / "out" / "model.safetensors")
    start, end = header["model.norm.weight"]["data_offsets"]
    assert (set(data[start:end]) == {1}) == (counts == OVERLAY)


def test_a_tensor_that_the_index_lacks_in_two_shards(source):
    overlaid(source)
    edit_index(source, lambda where: where.update(extra=OVERLAY))
    edit_index(source, lambda where: where.pop("model.norm.weight"))
    assert "is in two shards" in (text := refusal(source))
    assert f"{INDEX} names neither" in text


def test_without_an_index_a_tensor_in_two_shards_is_refused(source):
    overlaid(source)
    (source / INDEX).unlink()
    text = refusal(source)
    assert f"model.norm.weight: is in two shards, {BASE} and {OVERLAY}" in text
    # and the advice works
    (source / OVERLAY).rename(source.parent / OVERLAY)
    assert open_source(source).tensors["model.norm.weight"].shard == BASE


def test_a_missing_shard_and_a_broken_one_are_both_named(source):
    (source / "model-00002-of-00006.safetensors").unlink()
    (source / "model-00004-of-00006.safetensors").write_bytes(b"x")
    text = refusal(source)
    assert "model-00002-of-00006.safetensors: shard is missing" in text
    assert "model-00004-of-00006.safetensors: " in text


def test_shards_without_an_index_are_all_read(source):
    indexed = open_source(source)
    (source / INDEX).unlink()
    found = open_source(source)
    assert (found.tensors, found.warnings) == (indexed.tensors, indexed.warnings)


def test_without_an_index_the_names_of_shards_say_how_many_there_are(source):
    (source / INDEX).unlink()
    (source / "model-00002-of-00006.safetensors").unlink()
    assert "model-00002-of-00006.safetensors: shard is missing" in refusal(source)


def test_consolidated_weights_are_another_form_of_the_same(tmp_path):
    for name in ("model", "consolidated"):
        (tmp_path / f"{name}.safetensors").write_bytes(file_of(GOOD, bytes(8)))
    (tmp_path / "config.json").write_text("{}")
    assert list(open_source(tmp_path).shards) == ["model.safetensors"]


def test_a_single_file_beside_an_index(source):
    (source / "model.safetensors").write_bytes(file_of({}))
    assert "runtimes disagree" in refusal(source)


def test_only_pickles(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only pytorch_model.bin" in refusal(tmp_path)


def test_unlisted_tensors_are_carried_over_with_a_warning(source, tmp_path):
    edit_index(source, lambda weight_map: weight_map.pop("model.norm.weight"))
    plan = moe_ckpt.make_plan(source)
    assert "model.norm.weight" in plan.warnings[0]
    assert "model.norm.weight" in {t.name for shard in plan.shards for t in shard.tensors}


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"a": 1, "a": 2}', "[" * 100_000])
def test_bad_configs(source, text):
    (source / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(source).startswith("config.json: ")


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
        {"compression_config": {"quant_method": "fp8"}},
        {"quantization_config": "fp8"},
    ],
)
def test_what_a_config_says_of_quantization_and_is_not_so_is_replaced(source, change):
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    plan = moe_ckpt.make_plan(source, format="bf16")
    assert "says that the weights are quantized, and none is" in plan.warnings[0]
    assert "fp8" not in plan.files["config.json"]


def test_what_is_said_beside_the_config_counts(source):
    said = {"quantization": {"quant_algo": "NVFP4"}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    plan = moe_ckpt.make_plan(source)
    assert plan.warnings[0].startswith("hf_quant_config.json says that the weights are quantized")
    (source / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        moe_ckpt.make_plan(source)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
KEYS = "model_type num_experts num_local_experts hidden_size moe_intermediate_size text_config"


@given(
    st.dictionaries(st.sampled_from(f"{KEYS} num_hidden_layers quantization_config".split()), JSON)
)
def test_any_config_gives_a_plan_or_a_refusal(tmp_path_factory, change):
    folder = tmp_path_factory.mktemp("config")
    for path in (FIXTURES / "qwen3_moe" / "source").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    refusal = None
    try:
        plan = moe_ckpt.make_plan(folder)
    except MoeCkptError as error:
        refusal = error
    if refusal is None:
        assert {e.num_experts for e in plan.experts} == {8}
    else:
        assert refusal.exit_code == 3
        assert refusal.problems
        assert not any("\n" in problem for problem in refusal.problems)
