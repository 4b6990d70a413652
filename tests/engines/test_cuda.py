"""The CUDA path: the same code on device tensors, the same bytes as on a CPU."""

from __future__ import annotations

import pytest
import torch
from kit.files import read_files
from kit.whole_plans import CASES, TARGETS, planned
from kit.with_scales import amax_for, scale_for

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.formats import FORMATS
from moe_ckpt.formats.amax import block_scale_of
from moe_ckpt.work.batches import Budget

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("model", "row", "quantize", "experts"), CASES, ids=lambda x: getattr(x, "name", x)
)
@pytest.mark.parametrize("stage_nbytes", [1, 4000, 1 << 20])
def test_same_files(tmp_path, model, row, quantize, experts, stage_nbytes):
    """Whole slabs and pieces of them, transposed, interleaved and not, split and fused."""
    plan = planned(model, row, quantize=quantize, experts=experts)
    execute(plan, tmp_path / "cpu", backend=backend_for("cpu"))
    budget = Budget(stage_nbytes, 1 << 12, 2)
    execute(plan, tmp_path / "cuda", backend=backend_for("cuda"), budget=budget)
    assert read_files(tmp_path / "cpu") == read_files(tmp_path / "cuda")


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("target", TARGETS)
def test_same_files_from_quantized_sources(tmp_path, row, target):
    """Decoded, recoded, and quantized again."""
    plan = planned("qwen3_moe_wide", row, quantize="linear")
    execute(plan, tmp_path / "in", backend=backend_for("cpu"))
    again = moe_ckpt.make_plan(
        tmp_path / "in", format=target, quantize="linear", allow_requantize=True
    )
    budget = Budget(20_000, 1 << 12, 2)
    execute(again, tmp_path / "cpu", backend=backend_for("cpu"))
    execute(again, tmp_path / "cuda", backend=backend_for("cuda"), budget=budget)
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
    scale = scale_for(row, amax_for(row, w))
    cpu = row.codec().quantize(w, scale)
    cuda = row.codec().quantize(w.cuda(), None if scale is None else scale.cuda())
    for role, tensor in cpu.items():
        assert torch.equal(tensor.view(torch.uint8), cuda[role].cpu().view(torch.uint8)), role


@pytest.mark.parametrize("largest", [2688.0, 448.0, 127.5, 7.5])
def test_same_scales_for_every_bfloat16(largest):
    """A division by a Python number would miss the last bit of many on CUDA."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    assert torch.equal(block_scale_of(amax, largest), block_scale_of(amax.cuda(), largest).cpu())
