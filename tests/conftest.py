"""What tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from kit.files import FIXTURES, write_headers

# Machines that run this differ in speed; nothing here is about time.
settings.register_profile("any", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("any")


@pytest.fixture(autouse=True)
def _signals():
    """What a command does to signals at its end must not reach the children of later tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


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
