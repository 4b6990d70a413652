"""The command as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


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


def wait_for_a_shard(process: subprocess.Popen, out: Path) -> None:
    """Until a conversion has finished a shard, and is in mid-work."""
    while not list(out.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
