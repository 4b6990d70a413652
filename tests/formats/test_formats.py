"""Number formats: the rows, E2M1, NVFP4's reference bytes, and largest magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.with_scales import encode

from moe_ckpt.formats import FORMATS, e2m1, find_format
from moe_ckpt.formats.amax import abs_max
from moe_ckpt.formats.fitting import formats_that_fit, tensor_parallel_sizes
from moe_ckpt.formats.scales import scale_of

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def codes(values):
    packed = e2m1.encode(torch.tensor(values, dtype=torch.float32).repeat_interleave(2))
    assert torch.equal(packed & 15, packed >> 4)
    return (packed & 15).tolist()


@pytest.mark.parametrize(("code", "value"), list(enumerate(e2m1.VALUES)))
def test_e2m1_holds_its_values(code, value):
    assert codes([value]) == [code]
    assert codes([-value]) == [code + 8 if value else 0]


# value, code below it on a tie: half to even
@pytest.mark.parametrize(
    ("tie", "code"),
    [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)],
)
def test_e2m1_rounds_ties_to_even(tie, code):
    low = e2m1.VALUES.index(max(v for v in e2m1.VALUES if v < tie))
    below, above = (torch.tensor(tie).nextafter(torch.tensor(x)).item() for x in (0.0, 9.0))
    assert codes([below, tie, above]) == [low, code, low + 1]
    assert codes([-below, -tie, -above]) == [low + 8, code + 8, low + 9]


def test_e2m1_saturates_and_keeps_the_sign_of_what_rounds_to_zero():
    assert codes([6.4, 7.0, 9.0, 1e4, -8.0]) == [7, 7, 7, 7, 15]
    assert codes([1e-30, -1e-30, 0.0, -0.0]) == [0, 8, 0, 0]


def test_e2m1_even_column_is_the_low_nibble():
    assert e2m1.encode(torch.tensor([0.5, -6.0, 1.0, 0.0])).tolist() == [0xF1, 0x02]
    assert e2m1.decode(torch.tensor([0xF1, 0x02], dtype=torch.uint8)).tolist() == [0.5, -6, 1, 0]


@given(st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=64))
def test_e2m1_picks_the_nearest_value(values):
    values = values[: len(values) // 2 * 2]
    decoded = e2m1.decode(e2m1.encode(torch.tensor(values))).tolist()
    for value, found in zip(values, decoded, strict=True):
        assert abs(found - value) == min(abs(abs(value) - v) for v in e2m1.VALUES)


def test_nvfp4_reference_vector():
    """A vector that ModelOpt 0.47 and compressed-tensors 0.19 agree on but for the zero block."""
    i = torch.arange(64)
    w = ((37 * i) % 64 - 31.5) / 16
    w[16:32] *= 0.01
    w[48:64] = 0
    w = w.to(torch.bfloat16).view(1, 2, 32)
    parts = encode(find_format("nvfp4"), w)
    assert parts["global_scale"].item() == 1.96875 / 2688 == 0.000732421875
    assert parts["block_scale"].view(torch.uint8).flatten().tolist() == [126, 73, 126, 56]
    rows = [bytes(row.tolist()).hex() for row in parts["qweight"][0]]
    assert rows == ["2f5e6cf9e3b6174e6d7ae2c5963f5e7c", "f0d4a6175e6df9e20000000000000000"]


@pytest.mark.parametrize("name", ["nvfp4", "fp8-tensor"])
def test_the_amax_decides_not_the_matrix(name):
    """Gate and up share the larger amax: the smaller one must be quantized with it."""
    w = torch.full((1, 2, 16), 0.5)
    row = find_format(name)
    alone, shared = encode(row, w, torch.tensor([0.5])), encode(row, w, torch.tensor([2.0]))
    assert not all(
        torch.equal(alone[role].view(torch.uint8), shared[role].view(torch.uint8)) for role in alone
    )
    for parts in (alone, shared):
        assert torch.allclose(row.codec().dequantize(parts), w, rtol=0.07)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_abs_max_is_not_finite_if_a_value_is_not(dtype, bad):
    w = torch.randn(4, 64).to(dtype)
    assert torch.equal(abs_max(w), w.float().abs().amax(-1))
    w[2, 5] = bad
    assert abs_max(w).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_rows_describe_what_the_module_makes(row):
    n, k = 130, 256
    w = torch.randn(1, n, k)
    made = encode(row, w)
    assert made.keys() == {part.role for part in row.parts} - {"input_scale"}
    for part in row.parts:
        if part.role == "input_scale":
            assert row.input_scale
            assert scale_of(np.zeros(1, np.float32), row.largest) == 1
            continue
        tensor = made[part.role]
        assert tensor.dtype == DTYPES[part.dtype]
        assert tuple(tensor.shape[1:]) == part.shape(n, k)
        if not part.is_scalar:
            assert tensor[0, 0].view(torch.uint8).numel() == part.row_nbytes(k)


def test_bits_per_weight():
    assert {row.name: row.bits_per_weight() for row in FORMATS} == {
        "nvfp4": 4.5,
        "nvfp4-w4a16": 4.5,
        "mxfp4": 4.25,
        "int4-g128": 4.125,
        "int4-g64": 4.25,
        "int4-g32": 4.5,
        "fp8-block": 8.002,
        "fp8-channel": 8,
        "fp8-tensor": 8,
        "mxfp8": 8.25,
        "int8-channel": 8,
        "bf16": 16,
    }


def test_devices_have_whole_blocks_of_the_experts():
    sizes = {n: tensor_parallel_sizes(find_format(n), 96) for n in ("nvfp4", "mxfp8", "fp8-tensor")}
    assert sizes == {"nvfp4": (1, 2), "mxfp8": (1,), "fp8-tensor": (1, 2, 4, 8, 16, 32)}


def test_formats_that_fit_are_those_of_all_shapes_and_the_last_one_is_sharded():
    every = "fp8-channel, fp8-tensor, int8-channel"
    assert formats_that_fit([(48, 40), (64, 32)]) == (
        f"--format {every} (tensor parallel 1, 2, 4, 8, 16, 32)"
    )
    assert formats_that_fit([(64, 32), (48, 40)]) == (
        f"--format {every} (tensor parallel 1, 2, 4, 8)"
    )
