"""Bytes and decoded weights against compressed-tensors' own compressors, given the same scales.

Its choice of scales is another matter: powers of two that clip, float32 scales rounded to the
dtype of the weights, 0.125 for an NVFP4 block of zeros.
"""

from __future__ import annotations

import pytest
import torch
from kit.with_scales import encode

from moe_ckpt.formats import e2m1, e8m0, find_format

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP4 = {"num_bits": 4, "type": "float"}
FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}

# name -> its name for the compressor, and the arguments
THEIRS = {
    "nvfp4": (
        "nvfp4-pack-quantized",
        FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "mxfp8": (
        "mxfp8-quantized",
        FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "fp8-tensor": ("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8-channel": ("float-quantized", FP8 | {"strategy": "channel"}),
    "fp8-block": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [128, 128]}),
    "int4-g128": ("pack-quantized", INT4 | {"group_size": 128}),
    "int4-g64": ("pack-quantized", INT4 | {"group_size": 64}),
    "int4-g32": ("pack-quantized", INT4 | {"group_size": 32}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}


def theirs(name):
    compressor, arguments = THEIRS[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    return BaseCompressor.get_value_from_registry(compressor), scheme


def ours(name, w):
    """All parts of one matrix, B = 1."""
    row = find_format(name)
    return encode(row, w)


def scales_of(name, parts):
    """Our scales as compressed-tensors' compressors take them: floats, the global one divides."""
    if name == "nvfp4":
        return {
            "weight_scale": parts["block_scale"][0].float(),
            "weight_global_scale": 1 / parts["global_scale"],
        }
    if name == "fp8-tensor":
        return {"weight_scale": parts["global_scale"]}
    scale = parts["channel_scale" if "channel" in name else "block_scale"][0]
    return {"weight_scale": e8m0.decode(scale) if name.startswith("mxfp") else scale}


def code_of(state):
    return state["weight_packed" if "weight_packed" in state else "weight"]


def weights(dtype, seed=0, n=200):
    """Many magnitudes, with ties, zeros, a row of zeros and blocks of zeros."""
    torch.manual_seed(seed)
    w = torch.randn(n, 512) * torch.logspace(-4, 1, n).unsqueeze(-1)
    w[: n // 4] = w[: n // 4].mul(64).round().div(64)
    w[5] = 0
    w[6, ::2] = -0.0
    w[7:9, 128:256] = 0
    w[9:40] = torch.randint(-15, 16, (31, 512)).float() / 2  # ties of every 4-bit format
    w[9:40, ::16] = 7.5
    w[40:70] = torch.randint(-24, 25, (30, 512)).float() / 4
    w[40:70, ::16] = 6
    return w.to(dtype).unsqueeze(0)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_those_of_its_compressor(name, dtype):
    w = weights(dtype)
    parts = ours(name, w)
    compressor, scheme = theirs(name)
    scales = scales_of(name, parts)
    if name.startswith("int4"):
        w = w.float()  # it divides bf16 by bf16 in bf16, and so rounds twice
    state = compressor.compress({"weight": w[0]} | scales, scheme)
    found, want = parts["qweight"][0], code_of(state)
    assert found.dtype == want.dtype
    if name == "nvfp4":
        assert_near_ties(w, parts, scales, found, want)
    else:
        assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    if name in ("nvfp4", "mxfp4", "mxfp8"):
        stored = parts["block_scale"][0]
        assert torch.equal(state["weight_scale"].view(torch.uint8), stored.view(torch.uint8))


def assert_near_ties(w, parts, scales, found, want):
    """Codes differ by one at most, and only within three units of 2**-24 of a tie.

    The weights are divided by block scale / divisor there and by block scale * global scale here,
    and the divisor is the rounded 1 / global scale. With its quotient we make its bytes.
    """
    scale = scales["weight_scale"] / scales["weight_global_scale"]
    quotient = w[0].float() / scale.repeat_interleave(16, -1)
    assert torch.equal(e2m1.encode(quotient.clone()), want)
    ours, theirs = (torch.stack((x & 15, x >> 4), -1).flatten(-2).int() for x in (found, want))
    different = ours != theirs
    assert different.float().mean() < 0.001
    assert ((ours - theirs)[different].abs() == 1).all()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    distance = (quotient[different].abs().unsqueeze(-1) / ties - 1).abs()
    assert (distance <= 3 * 2.0**-24).any(-1).all()


@pytest.mark.parametrize("name", THEIRS)
def test_decoded_weights_are_those_of_its_decompressor(name):
    parts = ours(name, weights(torch.bfloat16))
    compressor, scheme = theirs(name)
    packed = "pack" in THEIRS[name][0]
    state = {"weight_packed" if packed else "weight": parts["qweight"][0]}
    state |= scales_of(name, parts)
    if name in ("nvfp4", "mxfp4", "mxfp8"):
        state["weight_scale"] = parts["block_scale"][0]
    if name.startswith("int4"):
        state["weight_shape"] = torch.tensor([200, 512])
    want = compressor.decompress(state, scheme)["weight"]
    if name == "nvfp4":
        parts["global_divisor"] = state["weight_global_scale"]
    found = find_format(name).codec().dequantize(parts)[0]
    assert torch.equal(found.to(want.dtype), want)
