"""Memory and CPU time of whole conversions, against bounds that only a mistake exceeds.

CPU time is what this process used, not what a clock shows: other work on the machine hardly counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

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
