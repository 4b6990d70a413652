"""Time and peak memory of a conversion, beside `cp` of the same files, in one run.

    python bench/convert.py WORKDIR [--format nvfp4] [--device cpu]

WORKDIR needs about 12 GB and is best in memory (/dev/shm): then nothing but the program is
measured. Peak memory is the resident set of the whole process, as `/usr/bin/time -v` counts it,
less that of a process that only imports torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Transposed is Llama 4's: 16 experts of 160 MB and 80 MB, larger than the buffers.
FORMS = {
    "fused": ["--shard-size", "5GB"],
    "split": ["--shard-size", "500MB"],
    "transposed": [*"--experts 16 --hidden 5120 --intermediate 8192 --vocab 32768".split()],
}


def run(*command: object) -> tuple[float, int]:
    """Seconds, and peak resident bytes."""
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch_seconds, torch_nbytes = run(sys.executable, "-c", "import torch")
    print(f"import torch  {torch_seconds:5.1f} s  {torch_nbytes / 2**20:6.0f} MiB")
    for form, options in FORMS.items():
        source, out = args.workdir / form, args.workdir / "out"
        run(sys.executable, HERE / "make_checkpoint.py", source, "--form", form, *options)
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "moe_ckpt", "convert", source, out, "-q"]
        seconds, peak = run(*command, "--format", args.format, "--device", args.device)
        shutil.rmtree(out)
        # A shard at a time: source and copy together would not fit in memory.
        copy_seconds = 0.0
        for path in sorted(source.glob("*.safetensors")):
            copy_seconds += run("cp", path, args.workdir / "copy")[0]
            (args.workdir / "copy").unlink()
        shutil.rmtree(source)
        print(
            f"{form:12}  {seconds:5.1f} s  {(peak - torch_nbytes) / 2**20:6.0f} MiB above torch  "
            f"{nbytes / 1e9 / seconds:.2f} GB/s  cp {copy_seconds:.1f} s, "
            f"ratio {seconds / copy_seconds:.1f}"
        )


if __name__ == "__main__":
    main()
