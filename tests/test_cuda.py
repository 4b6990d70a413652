"""The CUDA path: the same code on device tensors, the same bytes as on a CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import FIXTURES, read_files

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.formats import FORMATS, nvfp4_from_mxfp4
from moe_ckpt.formats.amax import abs_max, scale_of
from moe_ckpt.schedule import Budget

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_same_files(tmp_path, model, row):
    options = {"format": row.name, "quantize": "linear"}
    if row.input_scale:
        options["stats"] = [FIXTURES / model / "stats.json"]
    for device in ("cpu", "cuda"):
        moe_ckpt.convert(FIXTURES / model / "source", tmp_path / device, device=device, **options)
    assert read_files(tmp_path / "cpu") == read_files(tmp_path / "cuda")


@pytest.mark.parametrize("model", ["llama4", "gpt_oss"])
@pytest.mark.parametrize("experts", ["split", "fused"])
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("stage_nbytes", [1, 4000, 1 << 20])
def test_same_files_from_transposed_experts(tmp_path, model, experts, row, stage_nbytes):
    """Whole slabs and pieces of them, interleaved and not, split and fused."""
    stats = [FIXTURES / model / "stats.json"] if row.input_scale else []
    plan = moe_ckpt.make_plan(
        FIXTURES / model / "source", format=row.name, stats=stats, experts=experts
    )
    execute(plan, tmp_path / "cpu", device=torch.device("cpu"))
    budget = Budget(stage_nbytes, 1 << 12, 2)
    execute(plan, tmp_path / "cuda", device=torch.device("cuda"), budget=budget)
    assert read_files(tmp_path / "cpu") == read_files(tmp_path / "cuda")


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bytes_for_adversarial_weights(row, dtype):
    """Ties, negative zeros, subnormals and zero blocks, in every scale."""
    torch.manual_seed(0)
    grid = torch.tensor([0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0])
    w = grid[torch.randint(0, 10, (8, 64, 512))] * torch.randint(-1, 2, (8, 64, 512))
    w *= torch.logspace(-30, 3, 8).view(-1, 1, 1) if dtype != torch.float16 else 0.01
    w[3] = -0.0
    w = w.to(dtype)
    amax = abs_max(w) if row.amax_of_rows else abs_max(w.flatten(1))
    cpu, cuda = row.codec().quantize(w, amax), row.codec().quantize(w.cuda(), amax.cuda())
    for role, tensor in cpu.items():
        assert torch.equal(tensor.view(torch.uint8), cuda[role].cpu().view(torch.uint8)), role


@pytest.mark.parametrize("largest", [2688.0, 448.0, 127.5, 7.5])
def test_same_scales_for_every_bfloat16(largest):
    """A division by a Python number would miss the last bit of many on CUDA."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    assert torch.equal(scale_of(amax, largest), scale_of(amax.cuda(), largest).cpu())


def test_same_bytes_of_a_cast_from_mxfp4():
    torch.manual_seed(0)
    parts = {
        "qweight": torch.randint(0, 256, (2, 64, 512), dtype=torch.uint8),
        "block_scale": torch.randint(90, 130, (2, 64, 32), dtype=torch.uint8),
    }
    largest = nvfp4_from_mxfp4.max_exponent(parts)
    cpu, inexact = nvfp4_from_mxfp4.cast(parts, largest)
    on_cuda = {role: tensor.cuda() for role, tensor in parts.items()}
    assert torch.equal(nvfp4_from_mxfp4.max_exponent(on_cuda).cpu(), largest)
    cuda, also_inexact = nvfp4_from_mxfp4.cast(on_cuda, largest.cuda())
    assert inexact == also_inexact > 0
    for role, tensor in cpu.items():
        assert torch.equal(tensor.view(torch.uint8), cuda[role].cpu().view(torch.uint8)), role
