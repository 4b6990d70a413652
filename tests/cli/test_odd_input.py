"""Input that looks wrong and is not: it is converted, and nothing of it is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from kit.command import run_cli, run_here
from kit.files import read_files, read_tensors
from kit.hostile import CONFIG, DOWN, GATE_UP, INDEX, S1, S2, SHARD_OF, make, packed
from safetensors.torch import load_file, save_file

import moe_ckpt
from moe_ckpt.cli.commands import cli
from moe_ckpt.cli.process import run
from moe_ckpt.formats import find_format

ODD_NAMES = [
    *("../../etc/passwd", "/etc/passwd", "..", ".", "", " ", "a b", "%s%n%d", "{0}{name}", "$(id)"),
    *(
        "n" * 3000,
        "ü.weight",
        "専門家",
        "🤖",
        "a\\b",
        'quo"ted',
        "a/b.safetensors",
        "-rf",
        "~",
        "NaN",
    ),
    *("\x1b[31mred\x07", "line\nbreak", "tab\t", "nul\0", "\u202eevil", "\u2028", "\ufeffbom"),
    *("config.json", "weight_map", "0", "null", "a.b.c." * 200, "ﷺ" * 99),
]
ODD_TENSORS = {  # dtype, shape: all are copied as they are
    "scalar": ("F32", []),
    "none": ("BF16", [0]),
    "none of three": ("F32", [3, 0, 5]),
    "of ones": ("I64", [1, 1, 1, 1, 1, 1, 1, 1]),
    "bool": ("BOOL", [3]),
    "complex": ("C64", [2]),
    "odd count": ("U8", [7]),
    "four bits": ("F4", [2]),
}
BITS = {"F32": 32, "BF16": 16, "I64": 64, "BOOL": 8, "C64": 64, "U8": 8, "F4": 4}


def convert(folder: Path, *args: str) -> Path:
    """Convert in/ with the command, in this process."""
    assert run(partial(cli, ["convert", f"{folder}/in", f"{folder}/out", "-q", *args])) == 0
    return folder / "out"


def add(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """One more shard, with these tensors."""
    header: dict[str, object] = {}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    (folder / "in" / "odd.safetensors").write_bytes(packed(json.dumps(header).encode(), data))
    weight_map = SHARD_OF | dict.fromkeys(tensors, "odd.safetensors")
    (folder / "in" / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_odd_names_and_shapes_are_copied_bit_for_bit(tmp_path, capsys):
    make(tmp_path)
    tensors = {
        name: ("U8", [n % 5 + 1], bytes(range(n, n + n % 5 + 1)))
        for n, name in enumerate(ODD_NAMES)
    }
    for name, (dtype, shape) in ODD_TENSORS.items():
        nbytes = math.prod(shape) * BITS[dtype] // 8
        tensors[name] = (dtype, shape, bytes(n % 2 for n in range(nbytes)))
    add(tmp_path, tensors)
    before = read_files(tmp_path)
    out = convert(tmp_path, "-v")
    assert read_files(tmp_path / "in") == {
        name.removeprefix("in/"): data for name, data in before.items() if name.startswith("in/")
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "stats.json"}
    found = read_tensors(out)
    for name, (dtype, shape, values) in tensors.items():
        if dtype != "F4":  # the library counts bytes of these in its shapes
            assert (found[name].dtype, found[name].shape) == (dtype, tuple(shape)), name
        assert found[name].data == values, name
    assert run_cli("convert", tmp_path / "in", tmp_path / "b", "-v").returncode == 0
    assert read_files(tmp_path / "b") == read_files(out)


def test_nothing_printed_of_odd_names_moves_a_terminal(tmp_path):
    make(tmp_path)
    evil = "model.layers.0.self_attn.\x1b[2J\x9b31m\r\u202e.weight"
    add(tmp_path, {evil: ("BF16", [2, 2], bytes(8))})
    (tmp_path / "in" / "\x1b[31m\n.txt").symlink_to("/etc/hostname")
    (tmp_path / "in" / "\x1b[31m\n.safetensors").write_bytes(b"")
    folders = (tmp_path / "in", tmp_path / "out")
    for command in (
        ("inspect", folders[0]),
        ("convert", *folders, "--dry-run"),
        ("convert", *folders, "-v"),
    ):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
        lines = (done.stderr + done.stdout).removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in lines)
    assert "\\x1b[31m\\n.txt" in done.stderr
    assert "\\x1b[31m\\n.safetensors" in done.stderr


INDEXES = {
    "without a total size": {"weight_map": SHARD_OF},
    "with a wrong total size": {"metadata": {"total_size": -7}, "weight_map": SHARD_OF},
    "with other keys": {"weight_map": SHARD_OF, "made": [{"by": None}], "metadata": "x"},
    "without a tensor": {
        "weight_map": {n: s for n, s in SHARD_OF.items() if n != "model.norm.weight"}
    },
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_indexes_that_are_odd(tmp_path, index):
    make(tmp_path)
    whole = read_tensors(convert(tmp_path))
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "in" / INDEX).write_text(json.dumps(index))
    assert read_tensors(convert(tmp_path)) == whole


def test_a_shard_that_no_index_names_is_left_out_with_a_warning(tmp_path):
    make(tmp_path)
    shutil.copy(tmp_path / "in" / S1, tmp_path / "in" / "model-00003-of-00002.safetensors")
    done = run_cli("convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0
    assert "warning: left out, the index does not name it: model-00003-of-00002" in done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"model.safetensors"}


def test_a_single_file_of_any_name(tmp_path):
    make(tmp_path)
    root = tmp_path / "in"
    save_file(load_file(root / S1) | load_file(root / S2), root / "odd name %s{}.safetensors")
    for name in (S1, S2, INDEX):
        (root / name).unlink()
    assert set(SHARD_OF) - {GATE_UP, DOWN} < set(read_tensors(convert(tmp_path)))


ODD_FOLDERS = [
    *(
        "ünï 専門家 🤖",
        "two  spaces ",
        "line\nbreak",
        "\x1b[31mred",
        "%s{0}$(id)`id`",
        "-",
        "a'b\"c",
    ),
    *("x" * 255, "y/" * 200 + "z", "tilde~", "..hidden", os.fsdecode(b"not-\xff-utf8")),
]


@pytest.mark.parametrize("name", ODD_FOLDERS, ids=range(len(ODD_FOLDERS)))
def test_odd_folders(tmp_path, name):
    make(tmp_path)
    plain = read_files(convert(tmp_path))
    source = tmp_path / "of" / name
    source.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "in", source)
    stats = tmp_path / (name.replace("/", "")[:200] + ".json")
    shutil.copy(tmp_path / "stats.json", stats)
    out = tmp_path / "to" / name
    # What cannot be printed must pass the arguments and streams of a process, too.
    command = run_here if name.isprintable() else run_cli
    done = command("convert", source, out, "--stats", stats)
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() for line in done.stderr.removesuffix("\n").split("\n"))
    found = read_files(out)
    assert found.keys() == plain.keys()
    assert found["config.json"] == plain["config.json"]


TINY = 2.0**-126
MAX = {
    torch.bfloat16: 3.3895313892515355e38,
    torch.float16: 65504.0,
    torch.float32: 3.4028234663852886e38,
}
LEAST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}
NORMAL = {torch.bfloat16: TINY, torch.float16: 2.0**-14, torch.float32: TINY}
FORMATS = ["nvfp4", "nvfp4-w4a16", "mxfp4", "int4-g32", "fp8-block", "fp8-channel", "fp8-tensor"]
FORMATS += ["mxfp8", "int8-channel", "bf16"]
SIDE = 128  # what every format divides


def extremes(dtype) -> dict[str, torch.Tensor]:
    """Matrices of one expert [SIDE, SIDE], each a strain on some scale."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SIDE, SIDE, generator=generator)
    large, small = min(1e20, MAX[dtype]), max(1e-20, LEAST[dtype])
    spot = torch.zeros(SIDE, SIDE)
    spot[5, 7] = 1
    patterns = {
        "all zero": torch.zeros(SIDE, SIDE),
        "negative zero": torch.full((SIDE, SIDE), -0.0),
        "all the least subnormal": torch.full((SIDE, SIDE), LEAST[dtype]),
        "subnormal": noise.clamp(-1, 1) * NORMAL[dtype] / 2,
        "smallest normal": noise.sign() * NORMAL[dtype],
        "one outlier of 1e6": noise + spot * min(1e6, MAX[dtype]),
        "1e-20 beside 1e20": torch.where(noise > 0, large, small) * noise.sign(),
        "the largest": noise.sign() * MAX[dtype],
        "one largest, zeros": spot * -MAX[dtype],
        "one least, zeros": spot * LEAST[dtype],
        "ordinary": noise,
    }
    return {name: values.to(dtype) for name, values in patterns.items()}


def scales_of(folder: Path) -> dict[str, torch.Tensor]:
    """All scales, as they are stored: a byte of E8M0 as the power of two."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if "scale" in name.rpartition(".")[2]:
                is_bytes = tensor.dtype == torch.uint8
                found[name] = 2.0 ** (tensor.float() - 127) if is_bytes else tensor.float()
    return found


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("dtype", MAX, ids=str)
def test_extreme_weights(tmp_path, dtype, number_format):
    """Scales are finite and above 0, and what they decode to is near the source."""
    patterns = extremes(dtype)
    if find_format(number_format).limit < MAX[dtype]:  # what is larger is refused, see WEIGHT_CASES
        patterns = {name: values for name, values in patterns.items() if "largest" not in name}
    stack = torch.stack(list(patterns.values()))
    source = {
        GATE_UP: torch.cat((stack, stack.flip(0)), 1),
        DOWN: stack,
        "model.layers.0.mlp.gate.weight": torch.zeros(len(patterns), SIDE, dtype=dtype),
    }
    (tmp_path / "in").mkdir()
    save_file(source, tmp_path / "in" / "model.safetensors")
    config = CONFIG | {"num_experts": len(patterns), "moe_intermediate_size": SIDE}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"hidden_size": SIDE}))
    (tmp_path / "stats.json").write_text(
        json.dumps(
            {
                "schema": "moe-ckpt/stats",
                "version": 1,
                "modules": {GATE_UP: {"input_amax": 1e-30}, DOWN: {"input_amax": 3e38}},
            }
        )
    )
    args = ("--format", number_format, "--stats", f"{tmp_path}/stats.json")
    out = convert(tmp_path, *args)
    scales = scales_of(out)
    assert scales or number_format == "bf16"
    for name, scale in scales.items():
        assert scale.isfinite().all(), name
        assert (scale > 0).all(), name
        if scale.dim() == 0:
            assert (1 / scale).isfinite(), name

    moe_ckpt.convert(out, tmp_path / "back", format="bf16")
    found = load_file(tmp_path / "back" / "model.safetensors")
    names = list(patterns)
    bits = 4 if "4" in number_format.partition("-")[0] else 8
    for e, pattern in enumerate(names):
        for projection, values in (
            ("gate", stack[e]),
            ("up", stack[len(names) - 1 - e]),
            ("down", stack[e]),
        ):
            back = found[f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight"].double()
            values = values.double()
            shared = values.abs().max()
            if projection != "down":
                shared = max(stack[e].abs().max(), stack[len(names) - 1 - e].abs().max()).double()
            assert back.isfinite().all(), (pattern, projection)
            near = back - values
            block = values.abs().max() if "tensor" in number_format else local_amax(values)
            bound = block / (3 if bits == 4 else 12) + shared / 400 + TINY
            assert (near.abs() <= bound).all(), (pattern, projection, near.abs().max())


def local_amax(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in the row of each weight."""
    return values.abs().amax(1, keepdim=True)
