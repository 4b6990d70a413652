"""Quantized sources in another format: what is made of the decoded weights, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import load
from kit.files import read_files
from kit.quantized_sources import CUTS, bits, gpt_oss, make
from kit.with_scales import encode

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.formats import find_format

TARGETS = ("nvfp4", "fp8-channel", "int8-channel", "int4-g32", "mxfp8", "fp8-block")


def requantized(decoded, target):
    """The parts of decoded weights, by weight name and role, gate and up with one amax."""
    row = find_format(target)
    for name, weight in decoded.items():
        pair = ("gate_proj", "up_proj") if "down_proj" not in name else ("down_proj",)
        leaf = name.split(".")[-2]
        near = [name.replace(f".{leaf}.", f".{other}.") for other in pair]
        amax = torch.stack([decoded[other].abs().amax() for other in near]).amax().view(1)
        if row.amax_of_rows:
            amax = weight.abs().amax(-1)[None]
        parts = encode(row, weight.contiguous()[None], amax)
        for role, value in parts.items():
            yield name, role, value[0]


def spelled(plan, name, role):
    from moe_ckpt.dialects import find_dialect

    dialect = find_dialect(plan.dialect)
    (target,) = plan.formats
    return dialect.tensor_name(target, name.removesuffix(".weight"), role, False), (
        role in dialect.spellings[target].inverse
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "key", ["fp8-block-BF16", "fp8-channel-1d", "mxfp8-ct", "nvfp4-ct", "int8"]
)
def test_requantizing_is_quantizing_the_decoded_weights(tmp_path, key, target):
    _, decoded = make(tmp_path, key, 128, 256, beside=False)
    source = find_format(
        S.ENCODINGS[key][0].__name__.replace("_", "-") if key != "int8" else "int8-channel"
    ).name
    if target.removesuffix("-w4a16") == source:
        return
    plan = moe_ckpt.make_plan(tmp_path / "in", format=target, allow_requantize=True)
    outs = []
    for number, budget in enumerate(CUTS):
        out = tmp_path / f"out{number}"
        execute(plan, out, backend=backend_for("cpu"), budget=budget)
        outs.append(read_files(out))
    assert all(files == outs[0] for files in outs)
    found = load(tmp_path / "out0")
    for name, role, value in requantized(decoded, target):
        key_, inverse = spelled(plan, name, role)
        expected = 1 / value if inverse else value
        assert torch.equal(bits(found[key_]), bits(expected)), key_


@pytest.mark.parametrize("target", ["fp8-channel", "mxfp8", "int8-channel", "fp8-block"])
@pytest.mark.parametrize("kind", ["gpt_oss", "fp8_block"])
def test_requantizing_fused_experts(tmp_path, kind, target):
    """Interleaved or not, a block of the source may lie across gate and up."""
    i, h = (128, 256)
    if kind == "gpt_oss":
        _, decoded = gpt_oss(tmp_path, i, h)
    else:
        i, h = (192, 320) if target != "fp8-block" else (128, 384)
        tensors, decoded = S.fused(S.fp8_block, 3, i, h)
        S.save(tmp_path / "in", tensors, S.FP8, count=3, i=i, h=h)
    if target == "fp8-block" and kind == "fp8_block":
        return
    plan = moe_ckpt.make_plan(tmp_path / "in", format=target, experts="split")
    for number, budget in enumerate(CUTS):
        execute(plan, tmp_path / f"out{number}", backend=backend_for("cpu"), budget=budget)
    assert len({str(read_files(tmp_path / f"out{n}")) for n in range(len(CUTS))}) == 1
    found = load(tmp_path / "out0")
    for name, role, value in requantized(decoded, target):
        key, _ = spelled(plan, name, role)
        assert torch.equal(bits(found[key]), bits(value)), key
