"""The command as a user runs it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from moe_ckpt.cli.commands import cli
from moe_ckpt.cli.process import run


def run_cli(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user runs it."""
    command = Path(sys.executable).with_name("moe-ckpt")
    return subprocess.run(
        [str(command), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
        timeout=300,
    )


def run_here(*args: object) -> subprocess.CompletedProcess[str]:
    """The same from its entry in this process, where a process of its own is not the point."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(partial(cli, [str(arg) for arg in args], prog_name="moe-ckpt"))
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def wait_for_a_shard(process: subprocess.Popen, out: Path) -> None:
    """Until a conversion has finished a shard, and is in mid-work."""
    while not list(out.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
