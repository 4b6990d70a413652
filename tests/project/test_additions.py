"""What CONTRIBUTING.md says is all that an addition needs, made word for word in a copy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from kit.expert_layouts import config_of, matrices_of, pack, write
from kit.files import FIXTURES, read_json
from safetensors.torch import load_file

import moe_ckpt

PACKAGE = Path(moe_ckpt.__file__).parent
GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
FIRST_LINE = re.compile(r"# (moe_ckpt/[\w/]+\.py)(?:, in (\w+))?")


def edits_under(heading: str) -> list[tuple[str, str, str]]:
    """The blocks below a heading: file, the table that a row goes to or '', and the text."""
    text = GUIDE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    found = []
    for _, block in blocks:
        first, _, rest = textwrap.dedent(block).partition("\n")
        match = FIRST_LINE.fullmatch(first)
        assert match, first
        found.append((match[1], match[2] or "", rest))
    assert found
    return found


class Copy:
    """A copy of the package with the edits below a heading made, and the command in it."""

    def __init__(self, folder: Path, heading: str) -> None:
        self.root = folder
        shutil.copytree(PACKAGE, folder / "moe_ckpt")
        self.edits = edits_under(heading)
        for name, table, text in self.edits:
            path = folder / name
            if not table:
                assert not path.exists()
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
                continue
            imports = re.match(r"((?:from .*\n)*)\n*", text)
            assert imports
            row = textwrap.indent(f"{text[imports.end() :].rstrip()},\n", "    ")
            future = "from __future__ import annotations\n"
            after, count = re.subn(
                rf"^{table}\b[^\n]*= \(\n",
                lambda match, row=row: match[0] + row,
                path.read_text(),
                flags=re.MULTILINE,
            )
            assert count == 1, f"{name} has no {table}"
            path.write_text(after.replace(future, f"{future}\n{imports[1]}", 1))

    def run(self, *args: object, code: int = 0) -> str:
        """Run the command; returns all that it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "moe_ckpt", *map(str, args)],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr


WIDE = FIXTURES / "qwen3_moe_wide" / "source"


def test_a_number_format_is_three_edits(tmp_path):
    copy = Copy(tmp_path / "package", "Add a number format")
    assert len(copy.edits) == 3
    assert sum(len(text.splitlines()) for _, _, text in copy.edits) < 70
    out, back = tmp_path / "out", tmp_path / "back"
    assert "verified: 1 shard" in copy.run("convert", WIDE, out, "--format", "int8-g128")
    assert "nothing is wrong" in copy.run("verify", out, "--source", WIDE, "--all")
    assert "int8-g128" in copy.run("formats")
    copy.run("convert", out, back, "--format", "bf16")
    tensors, decoded = (load_file(folder / "model.safetensors") for folder in (out, back))
    module = "model.layers.0.mlp.experts.0.down_proj"
    codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert scale.shape == (codes.shape[0], codes.shape[1] // 128)
    wide = scale.float().repeat_interleave(128, 1)
    assert torch.equal(decoded[f"{module}.weight"], (codes.float() * wide).bfloat16())
    (group,) = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (8, 128)


@pytest.mark.parametrize("damage", ["scale", "codes"])
def test_what_is_added_is_verified_too(tmp_path, damage):
    """One edited scale, one edited code: found without a word about the format elsewhere."""
    copy = Copy(tmp_path / "package", "Add a number format")
    out = tmp_path / "out"
    copy.run("convert", WIDE, out, "--format", "int8-g128")
    shutil.rmtree(out / ".moe-ckpt")
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    start, end = entry[f"{name}_scale" if damage == "scale" else name]["data_offsets"]
    data[8 + length + start : 8 + length + end] = b"\x7f" * (end - start)
    path.write_bytes(data)
    said = copy.run("verify", out, "--source", WIDE, "--all", code=6)
    assert "up_proj" in said


def test_a_family_is_one_row(tmp_path):
    copy = Copy(tmp_path / "package", "Add a family of models")
    assert [table for _, table, _ in copy.edits] == ["FAMILIES"]
    matrices = matrices_of(4, 32, 64)
    base = "model.layers.0.block.experts"
    gate_up, down = pack("fused", "concat", matrices)
    tensors = {f"{base}.gate_up_proj": gate_up, f"{base}.down_proj": down}
    write(tmp_path / "in", tensors, config_of("example_moe", 4, 32, 64, 1))
    printed = copy.run("convert", tmp_path / "in", tmp_path / "out", "--format", "bf16", "-v")
    assert "Loads in  vLLM" in printed
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {
        f"{base}.{e}.{name}.weight": matrix
        for e, (gate, up, last) in enumerate(matrices)
        for name, matrix in (("w1", gate), ("w3", up), ("w2", last))
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], matrix) for name, matrix in expected.items())
    assert "example: example_moe" in copy.run("layouts")


def test_a_dialect_is_a_folder_and_two_lines(tmp_path):
    copy = Copy(tmp_path / "package", "Add a dialect")
    assert [table for _, table, _ in copy.edits if table] == ["DIALECTS", "_METHODS"]
    out, back = tmp_path / "out", tmp_path / "back"
    printed = copy.run(
        "convert", WIDE, out, "--format", "fp8-channel", "--dialect", "example", "-v"
    )
    assert "Dialect   example: a dialect to learn from" in printed
    assert "Loads in  vLLM; not in transformers" in printed
    said = read_json(out / "config.json")["quantization_config"]
    assert said["quant_method"] == "example"
    assert "nothing is wrong" in copy.run("verify", out, "--source", WIDE, "--all")
    copy.run("convert", out, back, "--format", "bf16")
    tensors, decoded = (load_file(folder / "model.safetensors") for folder in (out, back))
    module = "model.layers.0.mlp.experts.0.up_proj"
    codes, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_row_scale"]
    expected = (codes.float() * scale).bfloat16()
    assert torch.equal(decoded[f"{module}.weight"], expected)
