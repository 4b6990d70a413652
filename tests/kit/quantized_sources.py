"""Checkpoints that are quantized already, and what is asked of each conversion of one."""

from __future__ import annotations

import pytest
import torch
from kit import stored_as as S  # noqa: N812

import moe_ckpt
from moe_ckpt.work.batches import Budget

ATTENTION = "model.layers.0.self_attn"


def make(folder, key, i=128, h=128, *, count=2, shards=1, beside=True, step=1, **config):
    """Experts, attention and output head in an encoding; the decoded weights by name."""
    encode, options, said, _ = S.ENCODINGS[key]
    shared = {"shared_amax": True} if encode is S.nvfp4 else {}
    tensors, decoded = S.experts(encode, count, i, h, step=step, **options, **shared)
    for seed, name in enumerate([f"{ATTENTION}.o_proj", "lm_head"] if beside else []):
        more, values = S.linear(encode, name, i, h, seed, **options)
        tensors, decoded = tensors | more, decoded | values
    folder.mkdir(exist_ok=True)
    S.save(folder / "in", tensors, said, count=count, i=i, h=h, shards=shards, **config)
    return tensors, decoded


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(found, expected):
    """These tensors and no others, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def refused(tmp_path, tensors, said, *words, **config):
    """One line, nothing written."""
    S.save(tmp_path / "in", tensors, said, count=2, i=128, h=128, **config)
    with pytest.raises(moe_ckpt.CheckpointError) as caught:
        moe_ckpt.convert(tmp_path / "in", tmp_path / "out", device="cpu")
    (line,) = caught.value.problems
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def gpt_oss(folder, i, h, *, count=3, dtype="U8", step=1, **more):
    """A layer of gpt-oss as it is released."""
    tensors, decoded = S.fused(S.mxfp4, count, i, h, interleaved=True, blocks=True, step=step)
    if dtype != "U8":
        tensors = {
            k: t.view(torch.float8_e8m0fnu) if k.endswith("_scales") else t
            for k, t in tensors.items()
        }
    rows = torch.arange(count * 2 * i).view(count, 2 * i).bfloat16()
    tensors |= {f"{S.QWEN}.gate_up_proj_bias": rows}
    tensors |= {f"{S.QWEN}.down_proj_bias": torch.arange(count * h).view(count, h).bfloat16()}
    tensors |= more
    folder.mkdir(exist_ok=True)
    sizes = {"count": count, "i": i, "h": h, "model_type": "gpt_oss"}
    S.save(folder / "in", tensors, S.MXFP4, shards=2, **sizes)
    return tensors, decoded


BUDGETS = [None, Budget(3000, 20, 2), Budget(40000, 1 << 12, 3)]
CUTS = [None, Budget(20000, 5000, 2)]  # for sizes of 128 and more


def only(found, *endings):
    return {name: t for name, t in found.items() if name.endswith(endings)}
