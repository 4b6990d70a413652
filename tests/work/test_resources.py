"""What conversions take of a machine, and what is said where it gives too little.

Memory and CPU time are held against bounds that only a mistake exceeds.

CPU time is what this process used, not what a clock shows: other work on the machine hardly counts.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from kit.files import FIXTURES
from safetensors.torch import load_file, save_file

from bench.checkpoints import Model, write

MIB = 1 << 20
# A child inherits the peak that getrusage tells; that of its own memory is in /proc.
RUN = """
import json, re, resource, sys
from moe_ckpt.cli.process import main
sys.argv[0] = "moe-ckpt"
try:
    main()
finally:
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([peak, used.ru_utime + used.ru_stime]))
"""
TORCH = RUN.replace("from moe_ckpt.cli.process import main", "import torch").replace(
    "    main()", "    pass"
)


def measured(*args, code=RUN):
    """Peak bytes of memory, and seconds of CPU time."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


SOURCE = FIXTURES / "qwen3_moe" / "source"
COMMAND = Path(sys.executable).with_name("moe-ckpt")


def limited(limits, *args):
    """The command, where resources have these limits."""

    def limit():
        for which, value in limits.items():
            resource.setrlimit(which, value)

    command = [COMMAND, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)


@pytest.mark.slow
def test_few_files_are_open_at_once(tmp_path):
    """A shard for each tensor: the limit is for libraries and the output as well."""
    source, weight_map = tmp_path / "in", {}
    source.mkdir()
    for path in (FIXTURES / "qwen3_moe" / "hub").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            weight_map[name] = f"model-{len(weight_map):05}.safetensors"
            save_file({name: tensor}, source / weight_map[name])
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(SOURCE / "config.json", source)
    few = {resource.RLIMIT_NOFILE: (24, 24)}
    options = ("--format", "fp8-channel", "--max-shard-size", "6KB", "--workers", 4)
    for args in (
        ("convert", source, tmp_path / "out", *options),
        ("verify", tmp_path / "out", "--source", source, "--all", "--workers", 4),
        ("scan", source, "-o", tmp_path / "amax.json"),
    ):
        done = limited(few, *args, "-q")
        assert (done.returncode, done.stderr) == (0, "")
    assert len(weight_map) > 64
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 24


@pytest.mark.slow
def test_without_threads_it_says_so(tmp_path):
    """A stack that no address space holds is refused as a thread too many is, to root as well."""
    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("stacks have a limit here")
    none = {
        resource.RLIMIT_STACK: (1 << 36, resource.RLIM_INFINITY),
        resource.RLIMIT_AS: (1 << 35, 1 << 35),
    }
    ours = FIXTURES / "qwen3_moe" / "modelopt-nvfp4"
    for args in (
        ("convert", SOURCE, tmp_path / "out", "--format", "fp8-channel"),
        ("convert", SOURCE, tmp_path / "out", "--format", "bf16", "--hash-source"),
        ("verify", ours, "--source", SOURCE),
        ("scan", SOURCE, "-o", tmp_path / "amax.json"),
    ):
        done = limited(none, *args, "-q")
        assert done.returncode == 5, done.stderr
        assert done.stderr.startswith("moe-ckpt: error: no thread can be started: ")
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_named(tmp_path):
    """With memory for `inspect` and numpy, and not for a compiler or torch."""
    code = RUN.replace("VmHWM", "VmPeak").replace("finally:\n", "finally:\n    import numpy\n")
    enough = measured("inspect", SOURCE, code=code)[0] + 48 * MIB
    little = {resource.RLIMIT_AS: (enough, enough)}
    done = limited(little, "convert", SOURCE, tmp_path / "out", "--format", "fp8-channel", "-q")
    assert done.returncode == 5, done.stderr
    assert "torch cannot be loaded: " in done.stderr
    assert "failed to map" in done.stderr or "annot allocate memory" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


MODELS = {
    "fused": Model("fused", layers=1, experts=24),
    "split": Model("split", layers=1, experts=24),
    # Experts larger than a stage; transposed, so that the output of one is gathered.
    "transposed": Model("transposed", layers=1, experts=3, hidden=2048, intermediate=4096),
}


FORMATS = ["nvfp4", "mxfp4", "fp8-channel", "fp8-block", "int4-g32"]
# What is not compiled yet is compiled and kept on the disk.
COMPILE = """
import sys
import moe_ckpt
for number_format in sys.argv[3:]:
    moe_ckpt.convert(sys.argv[1], sys.argv[2], format=number_format, overwrite=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A conversion of next to nothing."""
    pytest.importorskip("numba")
    out = tmp_path_factory.mktemp("start") / "out"
    return measured("convert", "-q", FIXTURES / "qwen3_moe" / "source", out)


@pytest.fixture(scope="module")
def peak_of_torch():
    return measured(code=TORCH)[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", MODELS)
def test_memory_and_cpu_time(tmp_path, subtests, start, peak_of_torch, form):
    """Of about 200 MB."""
    source, out = tmp_path / form, tmp_path / "out"
    write(source, MODELS[form], 100_000_000)
    nbytes = MODELS[form].nbytes
    assert nbytes > 140_000_000
    write(tmp_path / "two", replace(MODELS[form], experts=2), 100_000_000)
    subprocess.run([sys.executable, "-c", COMPILE, tmp_path / "two", out, *FORMATS], check=True)
    for number_format in FORMATS:
        with subtests.test(number_format=number_format):
            args = ("convert", "-q", source, out, "--format", number_format, "--overwrite")
            peak, seconds = measured(*args)
            assert seconds - start[1] < 12 * nbytes / 1e9
            assert peak < peak_of_torch + 300 * MIB
            little, _ = measured(*args, "--memory", "24MiB")
            gathered = 40 * MIB if form == "transposed" else 0
            assert little < start[0] + (24 + 24) * MIB + gathered
