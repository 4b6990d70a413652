"""What tests share: reading outputs with the safetensors library, and making checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import deserialize

FIXTURES = Path(__file__).parent.parent / "fixtures"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            assert name not in found
            found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the private ones, name -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".moe-ckpt" not in path.parts
    }


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


def read_json(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES
