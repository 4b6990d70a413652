"""The benchmarks run, and say what they ran; how long it took is no business of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit.files import FIXTURES

from bench import cuda, summary
from bench.checkpoints import Model, of_size, sizes_of, write
from moe_ckpt.formats import FORMATS, find_format

ROOT = Path(__file__).parents[2]
TINY = "--experts 4 --hidden 128 --intermediate 128 --vocab 16 --shard-size 500KB".split()


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_compare_has_a_row_for_each_tool_format_form_and_size(tmp_path):
    sizes = ("--rounds", 1, "--size", "1MB", "--big", "2MB")
    formats = ("nvfp4",)
    target = tmp_path / "out.json"
    args = (tmp_path / "work", *sizes, "--formats", ",".join(formats), "--json", target)
    done = bench("compare", *args, *TINY)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    cases = {(row["form"], row["size"], row["tool"], row["format"]) for row in document["rows"]}
    tools = [("cp", "bf16"), *(("moe-ckpt", name) for name in formats)]
    assert cases == {
        *((form, size, *tool) for form in ("fused", "split") for size in ("small", "big")
          for tool in tools),
        *((form, "none", "import torch", "moe-ckpt") for form in ("fused", "split")),
    }  # fmt: skip
    rates = {(row["form"], row["tool"], row["format"]) for row in document["marginals"]}
    assert rates == {(form, *tool) for form in ("fused", "split") for tool in tools}
    made = {(found["form"], found["size"]): found["nbytes"] for found in document["inputs"]}
    for row in document["rows"]:
        assert row["error"] is None
        if row["tool"] == "cp":
            assert 0 <= row["output_nbytes"] - made[row["form"], row["size"]] < 20_000
        elif row["tool"] == "moe-ckpt":
            assert row["output_nbytes"] < 0.7 * made[row["form"], row["size"]]
            assert row["above_torch_nbytes"] < row["peak_nbytes"]
    assert not list((tmp_path / "work").iterdir())
    for word in ("nvfp4", "fused", "split", document["machine"]["cpu"]):
        assert word in done.stdout


@pytest.mark.slow
def test_a_tool_that_fails_is_a_row_and_moe_ckpt_that_fails_is_the_end(tmp_path):
    script = tmp_path / "slime.py"
    script.write_text("raise SystemExit('no such day')")
    target = tmp_path / "out.json"
    args = (tmp_path / "work", "--rounds", 2, "--size", "1MB", "--big", 0, "--forms", "split")
    args += ("--formats", "fp8-tensor", "--slime", script, "--json", target)
    done = bench("compare", *args, *TINY)
    assert done.returncode == 0, done.stderr
    rows = {row["tool"]: row for row in json.loads(target.read_text())["rows"]}
    assert rows["slime"]["error"] == "no such day"
    assert rows["slime"]["rounds"] == 1
    assert rows["moe-ckpt"]["rounds"] == 2
    done = bench("compare", *args, *TINY, "--formats", "mxfp4", "--intermediate", 24)
    assert done.returncode != 0
    assert "moe-ckpt mxfp4 failed" in done.stderr
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("form", ["fused", "split", "transposed"])
def test_checkpoints_are_what_they_say(tmp_path, form):
    model = of_size(Model(form, 1, 4, 64, 32, 16), 400_000)
    assert abs(model.nbytes - 400_000) < 40_000
    write(tmp_path / "in", model, 100_000)
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    assert 0 <= sizes_of(tmp_path / "in") - model.nbytes < 40_000
    data = b"".join(path.read_bytes() for path in shards)
    assert data.count(data[-64:]) == 1  # no short pattern repeated


def test_rates_leave_out_what_both_sizes_have():
    def row(tool, name, size, seconds):
        return {
            "tool": tool,
            "format": name,
            "form": "fused",
            "size": size,
            "error": None,
            "median_seconds": seconds,
            "min_seconds": seconds / 2,
            "cpu_seconds": seconds,
        }

    inputs = [{"form": "fused", "size": "small", "nbytes": 2}]
    inputs += [{"form": "fused", "size": "big", "nbytes": 8}]
    rows = [row("cp", "bf16", "small", 1), row("cp", "bf16", "big", 3)]
    rows += [row("moe-ckpt", "nvfp4", "small", 10), row("moe-ckpt", "nvfp4", "big", 14)]
    rows += [row("llm-compressor", "nvfp4", "small", 50), row("llm-compressor", "nvfp4", "big", 90)]
    rows += [row("slime", "fp8-tensor", "small", 3)]
    copied, ours, theirs = summary.marginals({"inputs": inputs, "rows": rows})
    assert (copied["median_rate"], copied["min_rate"], ours["median_rate"]) == (3, 6, 1.5)
    assert ours["median_of_cp"] == 0.5
    assert theirs["median_of_moe_ckpt"] == pytest.approx(0.1)


def test_a_plan_of_many_tensors(tmp_path):
    done = bench("plan", tmp_path, "--layers", 3, "--rounds", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    experts = 384 * 2 * 3
    for found in runs:
        assert found["tensors"] > 4 * experts
        assert found["headers_nbytes"] > found["tensors"] * 60
        assert found["index_nbytes"] > found["tensors"] * 60
    assert [found["form"] for found in runs] == ["fused", "split"]


@pytest.mark.slow
def test_stages_account_for_the_time(tmp_path):
    target = tmp_path / "out.json"
    done = bench("stages", tmp_path / "work", "--size", "2MB", "--json", target)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert {"read", "find amax", "quantize", "write"} <= document["stages"].keys()
    assert all(stage["calls"] for stage in document["stages"].values())
    spent = sum(stage["cpu_seconds"] for stage in document["stages"].values())
    assert 0 < spent <= document["cpu_seconds"] + 0.1
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_limits_of_files_and_starts(tmp_path):
    args = ("--size", "16MB", "--rounds", 1, "--threads", 2, "--json", tmp_path / "out.json")
    done = bench("limits", tmp_path, *args)
    assert done.returncode == 0, done.stderr
    figures = {
        f["what"]: f["value"] for f in json.loads((tmp_path / "out.json").read_text())["figures"]
    }
    assert {"read, 1 thread", "write, 2 threads", "copy memory, 2 threads"} <= figures.keys()
    header = figures["moe-ckpt convert: until a header is read"]
    weights = figures["moe-ckpt convert: until weights are read"]
    assert 0 < header < weights


@pytest.mark.parametrize("name", [row.name for row in FORMATS])
def test_kernels_that_are_measured_make_all_parts(name):
    weight = torch.randn(3, 128, 256).to(torch.bfloat16)
    task, parts = cuda.quantizer(name, weight)
    before = {role: part.clone() for role, part in parts.items()}
    for part in parts.values():
        part.view(torch.uint8).zero_()
    task()
    assert parts.keys() == {p.role for p in find_format(name).parts if not p.is_scalar}
    for role, part in parts.items():
        assert torch.equal(part.view(torch.uint8), before[role].view(torch.uint8))


def test_conversions_in_one_process(tmp_path):
    source = str(FIXTURES / "qwen3_moe" / "source")
    options = {"format": "fp8-channel", "device": "cpu"}
    found = cuda.conversions(source, str(tmp_path / "out"), 2, options)
    assert len(found["seconds"]) == 2
    assert found["output_nbytes"] > 100_000
    assert not (tmp_path / "out").exists()
