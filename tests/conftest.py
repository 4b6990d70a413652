"""What tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# The matrices of tests are too small for more threads of torch, which spin while they wait. It
# looks here when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from kit.files import FIXTURES, write_headers

import moe_ckpt

# Set where the suite is to test a wheel: the working tree must not stand in for it.
if os.environ.get("MOE_CKPT_TEST_INSTALLED"):
    assert "site-packages" in Path(moe_ckpt.__file__).parts, moe_ckpt.__file__

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
