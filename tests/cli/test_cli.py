"""The installed command: exit codes, streams, and what a user reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from kit.command import run_cli, run_here, wait_for_a_shard
from kit.files import FIXTURES, read_files

import moe_ckpt

SOURCE = FIXTURES / "qwen3_moe" / "source"
STATS = FIXTURES / "qwen3_moe" / "stats.json"


def test_convert_with_statistics(tmp_path):
    done = run_cli("convert", SOURCE, tmp_path / "out", "--stats", STATS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "shard 1 of 1: model.safetensors" in done.stderr
    assert "48 matrices nvfp4, 21 tensors copied" in done.stderr
    assert "warnings: none" in done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(".moe-ckpt", "config.json", "generation_config.json", "hf_quant_config.json"),
        *("model.safetensors", "moe-ckpt-recipe.toml"),
    }


def test_quiet_prints_nothing(tmp_path):
    done = run_cli(
        "convert", SOURCE, tmp_path / "out", "-q", "--stats", SOURCE.parent / "stats.json"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_statistics_one_line_says_so(tmp_path):
    done = run_cli("convert", SOURCE, tmp_path / "out")
    assert done.stderr.count("every quantized module gets input scale 1.0") == 1


def test_json_is_one_document_on_stdout(tmp_path):
    done = run_cli("convert", SOURCE, tmp_path / "out", "--json", "-v")
    document = json.loads(done.stdout)
    assert document["result"]["out_dir"] == str(tmp_path / "out")
    assert document["quantized"]["matrices"] == 48
    dry = json.loads(run_cli("convert", SOURCE, tmp_path / "b", "--json", "--dry-run").stdout)
    assert {k: v for k, v in document.items() if k != "result"} == dry


def test_dry_run_writes_nothing(tmp_path):
    done = run_cli("convert", SOURCE, tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert not (tmp_path / "out").exists()
    for text in (
        "qwen3_moe, family qwen_moe",
        "2 layers x 8 experts, fused",
        "[8, 96, 64] with down_proj [8, 64, 48]; E=8 (num_local_experts), I=48",
        "Loads in  vLLM, SGLang, TensorRT-LLM",
        "not a routed expert",
        "router",
        "6 -> 1 shard",
        "model.layers.0.mlp.experts.{0 ... 7}.{gate_proj, up_proj, down_proj}."
        "{weight, weight_scale, weight_scale_2, input_scale}",
        "of memory",
    ):
        assert text in done.stderr


def test_dry_run_tells_the_sizes_that_conversion_writes(tmp_path):
    dry = json.loads(run_cli("convert", SOURCE, tmp_path / "out", "--json", "--dry-run").stdout)
    assert run_cli("convert", SOURCE, tmp_path / "out", "-q").returncode == 0
    files = read_files(tmp_path / "out")
    assert sum(map(len, files.values())) == dry["output"]["write_nbytes"]
    for shard in dry["output"]["shards"]:
        assert len(files[shard["name"]]) == shard["nbytes"]
    assert set(dry["output"]["files"]) == set(files) - {"model.safetensors"}


def test_inspect(tmp_path):
    done = run_cli("inspect", SOURCE)
    assert (done.returncode, done.stdout) == (0, "")
    assert "2 layers x 8 experts, fused" in done.stderr
    document = json.loads(run_cli("inspect", SOURCE, "--json").stdout)
    assert document == moe_ckpt.inspect(SOURCE)
    assert document["experts"][0]["num_experts"] == 8


def test_inspect_reads_no_weights(tmp_path):
    """Weights that are not there cannot be read: the files are cut after their headers."""
    shutil.copytree(SOURCE, tmp_path / "in")
    whole = json.loads(run_cli("inspect", tmp_path / "in", "--json").stdout)
    for path in (tmp_path / "in").glob("*.safetensors"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header])
        os.truncate(path, len(data))  # a hole
    assert json.loads(run_cli("inspect", tmp_path / "in", "--json").stdout) == whole


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ((), 2, "Usage"),
        (("convert",), 2, "Missing argument"),
        (("convert", "IN", "OUT", "--format", "int3"), 2, "nvfp4-w4a16"),
        (("convert", "IN", "OUT", "--quantize", "all"), 2, "experts, linear"),
        (("convert", "IN", "OUT", "--format", "fp8-tensor"), 2, "nvfp4-w4a16"),
        (("convert", "IN", "OUT", "--max-shard-size", "big"), 2, "5GB"),
        (("convert", "IN", "OUT", "--max-shard-size", "0"), 2, "5GB"),
        (("convert", "IN", "OUT", "--device", "tpu"), 2, "cuda:N"),
        (("convert", "IN", "OUT", "--missing-stats", "x"), 2, "constant"),
        (("convert", "IN", "OUT", "--device", "cuda:99"), 5, "--device cpu"),
        (("convert", "/nowhere", "OUT"), 3, "is not a folder"),
        (("convert", "IN", "OUT", "--stats", "/nowhere"), 3, "No such file"),
        (("inspect", "OUT"), 3, "is not a folder"),
        (("convert", "IN", ""), 2, "is empty"),
        (("inspect", ""), 2, "is empty"),
        (("convert", "IN", "OUT", "--weight-amax", ""), 2, "is empty"),
        (("convert", "IN", "OUT", "--recipe", ""), 2, "is empty"),
        (("convert", "IN", "OUT", "--stats", ""), 2, "is empty"),
        (("inspect", "x" * 300), 3, "is not a folder"),
    ],
)
def test_exit_codes(tmp_path, args, code, text):
    paths = {"IN": SOURCE, "OUT": tmp_path / "out"}
    done = run_here(*(paths.get(arg, arg) for arg in args))
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_errors_are_lines_that_name_the_file(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "in")
    first, second = sorted((tmp_path / "in").glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    done = run_cli("convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert [
        line.startswith(f"moe-ckpt: error: {p.name}: ")
        for line, p in zip(lines, (first, second), strict=True)
    ]


def test_torch_is_loaded_only_to_convert():
    code = (
        "import sys, moe_ckpt, moe_ckpt.cli.commands, moe_ckpt.planning.planner;"
        "import moe_ckpt.report.plan_report, moe_ckpt.planning.stats;"
        "moe_ckpt.make_plan(sys.argv[1]); moe_ckpt.inspect(sys.argv[1]);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SOURCE)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_help_imports_only_what_it_needs():
    code = (
        "import sys; from moe_ckpt.cli.commands import cli; cli(['--help'], standalone_mode=False);"
        "print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for module in ("torch", "numpy", "tqdm", "safetensors", "moe_ckpt.planning.planner"):
        assert f"'{module}'" not in done.stdout


def test_the_public_functions_stay_functions(tmp_path):
    """Importing a submodule must not replace a function of the same name."""
    moe_ckpt.convert(SOURCE, tmp_path / "out")
    assert callable(moe_ckpt.convert)
    assert callable(moe_ckpt.inspect)
    assert callable(moe_ckpt.make_plan)
    with pytest.raises(AttributeError):
        _ = moe_ckpt.nothing


def interrupt(args, out, number, handler, code):
    """Send a signal in mid-work to a command started with a handler for it; returns stderr."""
    start = partial(signal.signal, number, handler) if number != signal.SIGKILL else None
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True, preexec_fn=start) as process:
        assert process.stderr is not None
        wait_for_a_shard(process, out)
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(60) == code
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals_that_the_shell_wants_ignored_are(tmp_path, slow_model, number):
    """As nohup does with hangups, and a shell script with Ctrl-C for what runs behind it."""
    command = Path(sys.executable).with_name("moe-ckpt")
    out = tmp_path / "out"
    args = [command, "convert", slow_model, out, "--max-shard-size", "40MB"]
    interrupt(args, out, number, signal.SIG_IGN, 0)
    assert (out / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_interrupted(tmp_path, slow_model, number, code):
    out = tmp_path / "new" / "out"
    command = Path(sys.executable).with_name("moe-ckpt")
    args = [command, "convert", slow_model, out, "--max-shard-size", "40MB"]
    errors = interrupt(args, out, number, signal.SIG_DFL, code)
    assert "Traceback" not in errors
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.index.json"))
    kept = list(out.glob("*.safetensors"))
    assert kept
    count = f"{len(kept)} of {len(moe_ckpt.make_plan(slow_model, max_shard_size='40MB').shards)}"
    if number != signal.SIGKILL:
        assert f"\n{count} shards are finished and stay\n" in errors
        assert errors.endswith("moe-ckpt: error: interrupted; run the same command again\n")
        assert [path.name for path in (out / ".moe-ckpt").iterdir()] == ["journal.jsonl"]
    inodes = {path: path.stat().st_ino for path in kept}
    again = subprocess.run(args, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"\ngoing on: {count} shards are finished\n" in again.stderr
    assert {path: path.stat().st_ino for path in kept} == inodes
    assert (out / "config.json").exists()


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&1 | true"])
def test_a_closed_stderr_does_not_cost_the_work(tmp_path, redirect):
    command = Path(sys.executable).with_name("moe-ckpt")
    line = f"set -o pipefail; {command} convert {SOURCE} {tmp_path}/out {redirect}"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ("inspect {source} --json", 0),
        ("convert {source} {out} --json -q --stats {stats}", 0),
        ("verify {ours} --json -q", 0),
        ("verify {others} --json", 6),
        ("layouts", 0),
        ("formats --json", 0),
        ("convert --help", 0),
    ],
)
def test_who_reads_has_enough(tmp_path, args, code):
    """As with ``| head``: no error, and what is found counts."""
    models = FIXTURES / "qwen3_moe"
    args = args.format(
        source=SOURCE,
        out=tmp_path / "out",
        stats=STATS,
        ours=models / "modelopt-nvfp4",
        others=models / "llm-compressor-nvfp4a16",
    )
    command = Path(sys.executable).with_name("moe-ckpt")
    line = f"set -o pipefail; {command} {args} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code
    for words in ("Broken pipe", "standard output", "Traceback", "Exception ignored"):
        assert words not in done.stderr
    if not code:
        assert "error" not in done.stderr


def test_a_full_stdout_is_an_environment_fault():
    command = Path(sys.executable).with_name("moe-ckpt")
    line = f"{command} inspect {SOURCE} --json >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == "moe-ckpt: error: standard output: No space left on device\n"


def test_warnings_are_counted_by_kind(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "in")
    (tmp_path / "in" / "extra.safetensors").write_bytes(b"")
    (tmp_path / "secret").write_text("")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    stats = json.loads(STATS.read_text())
    stats["modules"]["stranger"] = {"input_amax": 1}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    args = ("convert", tmp_path / "in", tmp_path / "out", "--stats", tmp_path / "stats.json")
    done = run_cli(*args, "--json")
    assert done.stderr.count("moe-ckpt: warning: ") == 3
    assert "warnings: 2 on files, 1 on statistics" in done.stderr
    kinds = [warning["kind"] for warning in json.loads(done.stdout)["warnings"]]
    assert kinds == ["files", "files", "statistics"]
