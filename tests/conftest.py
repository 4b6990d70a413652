"""What tests share: reading outputs with the safetensors library, and making checkpoints."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from safetensors import deserialize

# Machines that run this differ in speed; nothing here is about time.
settings.register_profile("any", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("any")

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


@pytest.fixture(autouse=True)
def _signals():
    """What a command does to signals at its end must not reach the children of later tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for_a_shard(process: subprocess.Popen, out: Path) -> None:
    """Until a conversion has finished a shard, and is in mid-work."""
    while not list(out.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)


def read_json(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


def write_headers(
    folder: Path, shards: dict[str, dict[str, tuple[str, list[int]]]], config
) -> Path:
    """A checkpoint whose weights are all zero and take no disk: name -> (dtype, shape)."""
    bits = {"BF16": 16, "F16": 16, "F32": 32, "I64": 64, "U8": 8, "F8_E4M3": 8, "BOOL": 8}
    bits |= {"I8": 8, "I32": 32, "U32": 32, "F8_E8M0": 8}
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        header, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * bits[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def slow_model(tmp_path):
    """A checkpoint that takes some seconds: sparse, so zeros, and no disk."""
    E, I, H = 64, 512, 1024
    tensors = {}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        tensors[f"{prefix}.gate_up_proj"] = ("BF16", [E, 2 * I, H])
        tensors[f"{prefix}.down_proj"] = ("BF16", [E, H, I])
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H, "num_hidden_layers": 4}
    return write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
