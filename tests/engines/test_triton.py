"""The Triton kernels: the bytes of the torch codecs, in the interpreter, in PTX, and on CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_ckpt.formats import FORMATS, find_format
from moe_ckpt.formats.amax import abs_max

pytest.importorskip("triton", "3.6", reason="needs Triton 3.6, which comes with torch for CUDA")

from kit.triton_cases import CODECS, DTYPES, check, differences, hard
from kit.with_scales import amax_for, scale_for
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moe_ckpt.kernels import gpu, triton_kernels

TESTS = Path(__file__).parents[1]
KERNELS = ("row_amax", "pack_pairs", "round_bytes")


def test_every_format_but_bf16_has_a_kernel():
    """bf16 is a copy, or a cast, in torch."""
    assert {row.module for row in FORMATS} - {"bf16"} == set(gpu.FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("names", [CODECS[::2], CODECS[1::2]], ids=" ".join)
def test_same_bytes_in_the_interpreter(names):
    """In a process of its own: Triton decides on import whether it interprets."""
    command = [sys.executable, "-m", "kit.triton_cases", *names]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


class Target:
    """A device that kernels are compiled for and that is not there."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return self.target


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that compiles, for a capability, what a call would launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = []

    class Compile:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: kernels.append(
                self.kernel.warmup(*args, grid=grid, **options)
            )

    for name in KERNELS:
        monkeypatch.setattr(triton_kernels, name, Compile(getattr(triton_kernels, name)))

    def of(capability, call, *args):
        monkeypatch.setattr(driver, "_active", Target(capability))
        call(*args)
        return kernels.pop().asm

    return of


def arguments(row, dtype, transposed):
    """What `gpu.quantize` takes, for a matrix of usual sizes."""
    w = torch.zeros(2, 256, 512, dtype=dtype)
    if transposed:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    scale = scale_for(row, amax_for(row, w.contiguous()))
    out = row.codec().quantize(w.contiguous(), scale)
    return row.module, w, scale, out


def hold_to_ieee(asm, divides):
    """Nothing approximate, flushed, or fused by the compiler."""
    ptx = asm["ptx"]
    assert not re.findall(r"\S*(?:\.ftz|\.approx|\.full|mad\.f32|\.sat)\S*", ptx)
    assert not re.findall(r"\b(?:add|sub|mul)\.f32", ptx)  # without .rn it may be fused
    assert set(re.findall(r"\bdiv\.[a-z]\S*", ptx)) == ({"div.rn.f32"} if divides else set())
    assert not re.findall(r"\brcp\.", ptx)
    in_pairs = re.findall(r"call <(\d) x float> @llvm\.fma\.", asm["llir"])
    written = sum(map(int, in_pairs)) + asm["llir"].count("call float @llvm.fma.f32(")
    assert set(re.findall(r"\bfma\.\S+", ptx)) <= {"fma.rn.f32", "fma.rn.f32x2"}
    assert len(re.findall(r"\bfma\.", ptx)) + len(re.findall(r"\bfma\S+x2", ptx)) == written
    return written


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CODECS)
def test_ptx_keeps_to_ieee(compiled, name, capability):
    row = find_format(name)
    for dtype, transposed in (
        (torch.bfloat16, False),
        (torch.float16, True),
        (torch.float32, False),
    ):
        asm = compiled(capability, gpu.quantize, *arguments(row, dtype, transposed))
        fused = hold_to_ieee(asm, divides=not name.startswith("mxfp"))
        assert (fused == 0) == (name == "mxfp8")
        assert asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_ptx_of_amax_has_no_arithmetic_on_floats(compiled, capability):
    for dtype in DTYPES:
        w = torch.zeros(2, 256, 512, dtype=dtype)
        for weights in (w, w.transpose(1, 2)):
            asm = compiled(capability, gpu.row_amax, weights)
            assert hold_to_ieee(asm, divides=False) == 0
            assert not re.findall(r"\b(?:add|mul|max)\.\S*f(?:16|32)", asm["ptx"])


cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", CODECS)
class TestOnCuda:
    pytestmark = cuda

    def test_same_bytes(self, name):
        assert list(check(find_format(name), "cuda")) == []

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_same_bytes_of_many(self, name, dtype):
        """Usual weights, millions of them, at every size and with ties in all of them."""
        torch.manual_seed(0)
        w = torch.randn(8, 512, 2048) * torch.logspace(-6, 1, 8).view(-1, 1, 1)
        w[:, ::2] = torch.round(w[:, ::2] * 2**9) / 2**9
        w = w.to(dtype)
        assert differences(find_format(name), w, w.cuda()) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
class TestAmaxOnCuda:
    pytestmark = cuda

    def test_is_not_finite_where_a_weight_is_not(self, bad, dtype):
        w = hard(dtype)
        w[1, 3, 500] = bad
        found = gpu.row_amax(w.cuda()).cpu()
        assert torch.equal(found.isfinite(), abs_max(w).isfinite())
        assert found.isfinite().sum() == found.numel() - 1
