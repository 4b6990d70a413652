"""Memory and CPU time of whole conversions, against bounds that only a mistake exceeds.

CPU time is what this process used, not what a clock shows: other work on the machine hardly counts.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from kit.files import FIXTURES

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


MODELS = {
    "fused": Model("fused", layers=1, experts=24),
    "split": Model("split", layers=1, experts=24),
    # Experts larger than a stage; transposed, so that the output of one is gathered.
    "transposed": Model("transposed", layers=1, experts=3, hidden=2048, intermediate=4096),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory):
    """About 200 MB."""
    folder = tmp_path_factory.mktemp("big") / request.param
    write(folder, MODELS[request.param], 100_000_000)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A conversion of next to nothing."""
    pytest.importorskip("numba")
    out = tmp_path_factory.mktemp("start") / "out"
    return measured("convert", "-q", FIXTURES / "qwen3_moe" / "source", out)


@pytest.mark.parametrize(
    "number_format", ["nvfp4", "mxfp4", "fp8-channel", "fp8-block", "int4-g32"]
)
def test_memory_and_cpu_time(tmp_path, source, start, number_format):
    args = ("convert", "-q", source, tmp_path / "out", "--format", number_format)
    measured(*args)  # compiles what is not compiled yet
    peak, seconds = measured(*args, "--overwrite")
    nbytes = MODELS[source.name].nbytes
    assert nbytes > 140_000_000
    assert seconds - start[1] < 12 * nbytes / 1e9
    assert peak < measured(code=TORCH)[0] + 300 * MIB
    little, _ = measured(*args, "--overwrite", "--memory", "24MiB")
    gathered = 40 * MIB if source.name == "transposed" else 0
    assert little < start[0] + (24 + 24) * MIB + gathered
