"""The codecs one by one: reference vectors, rounding, zeros, extremes, chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.with_scales import amax_for, encode, scale_for

from moe_ckpt.formats import (
    FORMATS,
    bf16,
    e2m1,
    e8m0,
    find_format,
    fp8_block,
    int4,
    mxfp4,
    mxfp8,
    nvfp4,
    nvfp4_from_mxfp4,
)
from moe_ckpt.formats.amax import abs_max

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TINY = 2.0**-126
NONE = None  # the scale of codecs that find their own


def vector():
    """The weights that the reference bytes below are of."""
    i = torch.arange(64)
    w = ((37 * i) % 64 - 31.5) / 16
    w[16:32] *= 0.01
    w[48:64] = 0
    return w.to(torch.bfloat16).view(1, 2, 32)


def hexes(tensor):
    return [bytes(row.view(torch.uint8).tolist()).hex() for row in tensor[0]]


def words(tensor):
    return [" ".join(f"{word & 0xFFFFFFFF:08x}" for word in row) for row in tensor[0].tolist()]


def quantize(name, w):
    """All parts of the weights, scalars included."""
    return encode(find_format(name), w)


def decoded(name, w):
    return find_format(name).codec().dequantize(quantize(name, w))


def same(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# Reference vectors.


def test_mxfp8_reference_vector():
    """Of ModelOpt 0.47."""
    parts = mxfp8.quantize(vector(), NONE)
    assert parts["block_scale"].flatten().tolist() == [120, 120]
    assert hexes(parts["qweight"])[0].startswith("f863f370ec75d4f668f171e87654f56c")


def test_mxfp4_reference_vector():
    """ModelOpt 0.47 and compressed-tensors 0.19 agree but for zeros: 0 as here, ModelOpt's is 8."""
    parts = mxfp4.quantize(vector(), NONE)
    assert parts["block_scale"].flatten().tolist() == [126, 126]
    assert hexes(parts["qweight"]) == [
        "1e4d5be8c2a4063d0808808080080808",
        "d0c3a5163d5be9d20000000000000000",
    ]


def test_int4_reference_vector():
    """Of compressed-tensors 0.19 with float32 scales; rounding those to bf16 changes no code."""
    expected = [
        "18e5c390 b28f6c4a 88888888 88888888",
        "9f6d4b18 3a07e5b2 88888888 88888888",
    ]
    out = {"qweight": torch.empty(1, 2, 4, dtype=torch.int32), "block_scale": torch.empty(1, 2, 1)}
    parts = int4.of_group(32).quantize(vector(), NONE, out)
    assert parts["block_scale"].flatten().tolist() == [0.26249998807907104, 0.2541666626930237]
    assert words(parts["qweight"]) == expected
    parts = int4.of_group(32).quantize(vector(), NONE)
    assert parts["block_scale"].dtype == torch.bfloat16
    assert parts["block_scale"].flatten().tolist() == [0.26171875, 0.25390625]
    assert words(parts["qweight"]) == expected


def test_fp8_channel_reference_vector():
    """Of compressed-tensors 0.19 in float32."""
    parts = quantize("fp8-channel", vector())
    assert parts["channel_scale"].flatten().tolist() == [0.00439453125, 0.0042550223879516125]
    assert hexes(parts["qweight"])[0].startswith("fe6afa76f27bdbfd6ff878ef7d5bfb72")


# E8M0.


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_e8m0_exponents_are_exact_at_every_power_of_two(largest):
    """An amax of largest * 2**e has exponent e, and the next float32 has e + 1."""
    e_of_largest = math.frexp(largest)[1] - 1
    exponents = list(range(-126 - e_of_largest, 127 - e_of_largest + 1))
    exact = torch.tensor([largest * 2.0**e for e in exponents])
    infinity, zero = torch.tensor(torch.inf), torch.tensor(0.0)
    want = torch.tensor(exponents)
    for amax, exponent in (
        (exact, want),
        (exact.nextafter(infinity), want + 1),
        (exact.nextafter(zero), want),
        (exact * 0.75, want),  # more than half of it
        (exact / 2, want - 1),
    ):
        found = e8m0.encode(amax, largest).int() - 127
        assert torch.equal(found, exponent.clamp(-127, 127).int())


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_e8m0_ends(largest):
    amax = torch.tensor([0.0, 2.0**-149, TINY, torch.finfo(torch.float32).max])
    found = e8m0.encode(amax, largest).tolist()
    assert found[:3] == [0, 0, 0]
    assert found[3] == (253 if largest == 6 else 247)
    assert e8m0.inverse(torch.tensor([0, 127, 253], dtype=torch.uint8)).tolist() == [
        2.0**127,
        1,
        2.0**-126,
    ]


def test_e8m0_decodes_every_byte():
    byte = torch.arange(256, dtype=torch.uint8)
    found = e8m0.decode(byte)
    assert found[:255].tolist() == [math.ldexp(1, b - 127) for b in range(255)]
    assert found[255].isnan()


@given(st.floats(0, torch.finfo(torch.float32).max, width=32), st.sampled_from([6.0, 448.0]))
def test_e8m0_clips_nothing_and_is_the_smallest_such(amax, largest):
    e = e8m0.encode(torch.tensor([amax]), largest).item() - 127
    assert amax <= math.ldexp(largest, e)
    assert e == -127 or amax > math.ldexp(largest, e - 1)


# Rounding. Each row below has a first value that makes the scale 1.


@pytest.mark.parametrize("name", ["mxfp8", "fp8-channel", "fp8-tensor", "fp8-block"])
def test_e4m3_rounds_ties_to_even(name):
    row = torch.zeros(1, 1, 128)
    row[..., ::32] = 448
    ties = {17.0: 16, 19.0: 20, 432.0: 448, 2.0**-10: 0, 3 * 2.0**-10: 2.0**-8}
    ties |= {-tie: -value for tie, value in ties.items()}
    row[..., 1 : 1 + len(ties)] = torch.tensor(list(ties))
    assert decoded(name, row)[0, 0, 1 : 1 + len(ties)].tolist() == list(ties.values())


def test_mxfp4_rounds_ties_to_even():
    ties = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.tensor(ties + [-v for v in ties] + [0.0] * 16).view(1, 1, 32)
    want = [6.0, 0, 1, 1, 2, 2, 4, 4]
    assert decoded("mxfp4", row)[0, 0].tolist() == want + [-v for v in want] + [0.0] * 16


def test_int8_rounds_ties_to_even_and_stays_in_range():
    row = torch.tensor([127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5]).view(1, 1, -1)
    parts = quantize("int8-channel", row)
    assert parts["channel_scale"].item() == 1
    assert parts["qweight"].flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -128]


def test_int4_rounds_ties_to_even_and_stays_in_range():
    values = [7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, -7.5, -6.5]
    row = torch.tensor(values + [0.0] * 22).view(1, 1, 32)
    parts = quantize("int4-g32", row)
    assert parts["block_scale"].item() == 1
    want = [7, 0, 2, 2, 0, -2, -2, 6, -8, -6] + [0] * 22
    codes = [(word >> 4 * i) & 15 for word in parts["qweight"].flatten().tolist() for i in range(8)]
    assert [code - 8 for code in codes] == want
    assert decoded("int4-g32", row).flatten().tolist() == want


@pytest.mark.parametrize("amax", [1.0, 1.9, 3.3])
def test_int4_divides_by_the_scale_as_it_is_stored(amax):
    torch.manual_seed(0)
    w = torch.rand(1, 64, 32) * 2 * amax - amax
    parts = quantize("int4-g32", w)
    scale = parts["block_scale"].float()
    want = (w / scale).round().clamp(-8, 7) * scale
    assert torch.equal(int4.of_group(32).dequantize(parts), want)
    exact = abs_max(w) / 7.5
    assert same(parts["block_scale"], exact.unsqueeze(-1).bfloat16())


def test_bf16_keeps_bf16_and_rounds_the_rest():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].view(1, 2, -1)
    assert same(bf16.quantize(finite, NONE)["qweight"], finite)  # -0.0 too
    half = torch.tensor([65504.0, -0.0, 2.0**-24]).half().view(1, 1, -1)
    assert bf16.quantize(half, NONE)["qweight"].tolist() == [[[65536.0, -0.0, 2.0**-24]]]
    largest = torch.finfo(torch.bfloat16).max
    single = torch.tensor([3.4028235e38, -3.4028235e38, 1 + 2**-8, 1 + 3 * 2**-8, 2.0**-149])
    single = torch.cat((single, torch.tensor([-0.0]))).view(1, 1, -1)
    found = bf16.quantize(single, NONE)["qweight"]
    assert found.flatten().tolist() == [largest, -largest, 1, 1 + 2**-6, 0, 0]
    assert found.signbit().flatten().tolist() == [False, True, False, False, False, True]
    assert single[0, 0, 0] == torch.finfo(torch.float32).max  # the source is untouched


# Zeros and extremes.

SCALES = ("global_scale", "block_scale", "channel_scale")


def real_scales(parts):
    for role in SCALES:
        if role in parts:
            scale = parts[role]
            yield e8m0.decode(scale) if scale.dtype == torch.uint8 else scale.float()


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_have_defined_scales(row, dtype):
    w = torch.zeros(2, 130, 128, dtype=dtype)
    w[1, 0, 0] = 1
    parts = quantize(row.name, w)
    defined = 2.0**-127 if row.name.startswith("mxfp") else 1.0
    for scale in real_scales(parts):
        assert (scale[0] == defined).all()
        if scale.dim() > 1:
            assert (scale[1].flatten()[1:] == defined).all()
    found = row.codec().dequantize(parts)
    assert (found[0] == 0).all()
    assert found[1].count_nonzero() == 1
    if row.name != "int8-channel" and not row.name.startswith("int4"):
        assert found[1, 0, 0] == 1
    if row.name in ("mxfp4", "nvfp4"):
        assert (parts["qweight"][0] == 0).all()


EXTREMES = {
    "smallest subnormals": [2.0**-149, -(2.0**-149)],
    "bf16 subnormals": [2.0**-133, -(2.0**-133)],
    "largest float32": [3.4028235e38, -3.4028235e38, 1.0],
    "largest float16": [65504.0, -65504.0, 2.0**-24],
    "far apart": [1e20, 1e-20, -1e-20],
    "outlier": [1e6, 1e-3, -1e-3],
    "negative zero": [-0.0, 0.0, 1.0],
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_keep_finite_positive_scales(row, values, dtype):
    w = torch.tensor(values).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    w = w.repeat(128)[:256].view(1, 2, 128)
    parts = quantize(row.name, w)
    for scale in real_scales(parts):
        assert (scale > 0).all()
        assert scale.isfinite().all()
        assert (1 / scale).isfinite().all()  # runtimes invert some
    found = row.codec().dequantize(parts)
    assert (found * w.float() >= 0).all()
    # A code beyond the largest weight may stand for more than float32 holds.
    assert found.isfinite().all() or w.float().abs().max() > 3e38


@pytest.mark.parametrize("largest", [65504.0, 2.0**-24, 1e-3])
def test_int4_with_float16_scales_neither_overflows_nor_vanishes(largest):
    w = torch.full((1, 1, 32), largest)
    out = {
        "qweight": torch.empty(1, 1, 4, dtype=torch.int32),
        "block_scale": torch.empty(1, 1, 1, dtype=torch.float16),
    }
    for factor in (1.0, 1e6, 1e-6):
        scale = int4.of_group(32).quantize(w * factor, NONE, out)["block_scale"]
        assert 0 < scale.item() <= 65504


# Error bounds.


def half_step(name, w, parts):
    """Half the distance between the neighbours of each weight, or more."""
    magnitude = w.float().abs()
    if name in ("nvfp4", "nvfp4-w4a16"):
        scale = parts["block_scale"].float() * parts["global_scale"].view(-1, 1, 1)
        return scale.repeat_interleave(16, -1) * 1.07  # 6 may be up to 1/16 too small
    if name == "mxfp4":
        return e8m0.decode(parts["block_scale"]).repeat_interleave(32, -1)
    if name == "mxfp8":
        scale = e8m0.decode(parts["block_scale"]).repeat_interleave(32, -1)
        return torch.maximum(magnitude / 16, scale * 2.0**-10)
    if name.startswith("int4"):
        scale = parts["block_scale"].float()
        return scale.repeat_interleave(w.shape[-1] // scale.shape[-1], -1) * 0.54  # 7.5 becomes 7
    if name == "int8-channel":
        return parts["channel_scale"] * 0.501
    if name == "bf16":
        return magnitude / 256
    scale = next(iter(s for role, s in parts.items() if role != "qweight"))
    if name == "fp8-block":
        scale = scale.repeat_interleave(128, 1)[:, : w.shape[1]]
        scale = scale.repeat_interleave(128, 2)[..., : w.shape[2]]
    elif name == "fp8-tensor":
        scale = scale.view(-1, 1, 1)
    return torch.maximum(magnitude / 16, scale * 2.0**-10)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_within_half_a_step(row, dtype):
    torch.manual_seed(0)
    w = (torch.randn(3, 150, 256) * torch.logspace(-3, 0, 256)).to(dtype)
    parts = quantize(row.name, w)
    error = (row.codec().dequantize(parts) - w.float()).abs()
    assert (error <= half_step(row.name, w, parts) * 1.0001).all()


@pytest.mark.parametrize("name", [f.name for f in FORMATS if not f.name.startswith("int")])
def test_what_was_decoded_quantizes_to_itself(name):
    """Not of integers: the largest weight of a group, 7.5 steps, is not a code."""
    torch.manual_seed(1)
    w = torch.randn(2, 130, 256)
    w[:, :, ::16] = 6.0  # is in the block, the tile and the row, and is a power of two times 6
    once = decoded(name, w)
    assert torch.equal(decoded(name, once), once)


# Layout.


def test_int4_element_i_is_at_bits_4i_of_its_word():
    row = torch.zeros(1, 1, 32)
    row[0, 0, :8] = torch.tensor([-7.5, -6, -5, -4, -3, -2, -1, 7])
    assert words(int4.of_group(32).quantize(row, NONE)["qweight"])[0].startswith(
        "f7654320 88888888"
    )


def test_mxfp4_even_column_is_the_low_nibble():
    row = torch.zeros(1, 1, 32)
    row[0, 0, :4] = torch.tensor([0.5, -6.0, 1.0, 0.0])
    assert mxfp4.quantize(row, NONE)["qweight"][0, 0, :2].tolist() == [0xF1, 0x02]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (129, 128), (130, 300), (300, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_block_at_the_edges_is_as_if_zeros_followed(n, k, dtype):
    torch.manual_seed(0)
    w = (torch.randn(2, n, k) * torch.logspace(-2, 2, k)).to(dtype)
    padded = torch.zeros(2, -(-n // 128) * 128, -(-k // 128) * 128, dtype=dtype)
    padded[:, :n, :k] = w
    found, want = (fp8_block.quantize(x, NONE) for x in (w, padded))
    assert same(found["block_scale"], want["block_scale"])
    assert same(found["qweight"], want["qweight"][:, :n, :k])
    assert found["block_scale"].shape == (2, -(-n // 128), -(-k // 128))
    tile = w[:, 128:, 128:].float().abs().flatten(1)
    if tile.shape[1] and k < 256:
        assert torch.equal(found["block_scale"][:, -1, -1], tile.amax(1) / 448)
    decoded = fp8_block.dequantize(found)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, fp8_block.dequantize(want)[:, :n, :k])


@pytest.mark.parametrize("narrow", ["bfloat16", "float16", "float8_e8m0fnu"])
@pytest.mark.parametrize(
    ("row", "role"),
    [
        ("fp8-tensor", "global_scale"),
        ("fp8-channel", "channel_scale"),
        ("fp8-block", "block_scale"),
        ("int8-channel", "channel_scale"),
        ("int4-g32", "block_scale"),
    ],
)
def test_scales_of_any_width_are_decoded_exactly(row, role, narrow):
    if not hasattr(torch, narrow):
        pytest.skip(f"this torch has no {narrow}")
    w = torch.randn(2, 130, 160)
    parts = quantize(row, w)
    codec = find_format(row).codec()
    parts[role] = parts[role].to(getattr(torch, narrow))
    wide = parts | {role: parts[role].float()}
    found = codec.dequantize(parts)
    assert found.dtype == torch.float32
    assert torch.equal(found, codec.dequantize(wide))


def test_nvfp4_decodes_with_a_divisor():
    w = torch.randn(2, 4, 64)
    parts = quantize("nvfp4", w)
    divisor = 1 / parts["global_scale"]
    scale = parts["block_scale"].float() / divisor.view(2, 1, 1)
    want = e2m1.decode(parts["qweight"]) * scale.repeat_interleave(16, -1)
    assert torch.equal(nvfp4.dequantize(parts | {"global_divisor": divisor}), want)


# Chunks.


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_give_the_bytes_of_the_whole(data):
    """Rows, columns and matrices in any pieces, into a view of the result: what streaming does."""
    row = data.draw(st.sampled_from(FORMATS))
    codec = row.codec()
    row_step = row.row_step
    column_step = max([2, *(p.columns for p in row.parts if 0 < p.columns < 1 << 60)])
    N = data.draw(st.integers(1, 300 if row_step > 1 else 6))
    K = column_step * data.draw(st.integers(1, 3))
    if row_step > 1:
        K -= data.draw(st.sampled_from([0, 0, 1, 100]))  # ragged
    B = data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    w = (torch.randn(B, N, K) * torch.randn(B, N, 1)).to(data.draw(st.sampled_from(FLOATS)))
    scale = scale_for(row, amax_for(row, w))
    whole = codec.quantize(w, scale)
    n0 = row_step * data.draw(st.integers(0, (N - 1) // row_step))
    k0 = column_step * data.draw(st.integers(0, (K - 1) // column_step))
    b0 = data.draw(st.integers(0, B - 1))
    shapes = {p.role: p for p in row.parts if not p.is_scalar}
    out = {role: torch.zeros_like(tensor) for role, tensor in whole.items()}
    views = {}
    for role, part in shapes.items():
        columns = 0 if part.columns > 1 << 60 else k0 // part.columns
        views[role] = (slice(b0, None), slice(n0 // part.rows, None), slice(columns, None))
    of_chunk = None if scale is None else scale[(slice(b0, None), slice(n0, None))[: scale.ndim]]
    made = codec.quantize(
        w[b0:, n0:, k0:],
        of_chunk,
        {role: out[role][view] for role, view in views.items()},
    )
    fresh = codec.quantize(w[b0:, n0:, k0:], of_chunk)
    for role, view in views.items():
        assert same(made[role], whole[role][view])
        assert same(out[role][view], whole[role][view])
        assert same(fresh[role], whole[role][view])


# NVFP4 from MXFP4.


def mx(blocks, exponents):
    """Parts of one matrix: a row of blocks, each of 32 values times a power of two."""
    values = torch.tensor(blocks, dtype=torch.float32).view(1, 1, -1)
    packed = e2m1.encode(values)
    return {
        "qweight": packed,
        "block_scale": (torch.tensor(exponents) + 127).to(torch.uint8).view(1, 1, -1),
    }


def cast(parts, largest=None):
    """The parts of NVFP4, and how many blocks are not the same."""
    largest = max_exponent(parts) if largest is None else np.array([largest], np.int32)
    shape = parts["qweight"].shape
    made = {"qweight": np.empty(shape, np.uint8)}
    made["block_scale"] = np.empty((*shape[:2], shape[2] // 8), np.uint8)
    arrays = {role: tensor.numpy() for role, tensor in parts.items()}
    inexact = nvfp4_from_mxfp4.cast(arrays, largest, made)
    found = {role: torch.from_numpy(items) for role, items in made.items()}
    found["block_scale"] = found["block_scale"].view(torch.float8_e4m3fn)
    found["global_scale"] = torch.from_numpy(nvfp4_from_mxfp4.global_scale(largest))
    return found, inexact


def max_exponent(parts):
    return nvfp4_from_mxfp4.max_exponent({role: tensor.numpy() for role, tensor in parts.items()})


SIX, ONE, ZERO = [6.0] * 32, [1.0, -1.0] * 16, [0.0] * 32


def test_mxfp4_becomes_nvfp4_without_loss():
    torch.manual_seed(0)
    parts = {
        "qweight": torch.randint(0, 256, (3, 8, 64), dtype=torch.uint8),
        "block_scale": torch.randint(110, 128, (3, 8, 4), dtype=torch.uint8),
    }
    made, inexact = cast(parts)
    assert inexact == 0
    assert same(made["qweight"], parts["qweight"])
    assert torch.equal(nvfp4.dequantize(made), mxfp4.dequantize(parts))
    largest = parts["block_scale"].int().amax((1, 2)) - 127
    assert torch.equal(made["global_scale"], torch.exp2(largest.float() - 8))


def test_mxfp4_far_apart_is_exact_down_to_2_to_the_minus_17():
    made, inexact = cast(mx([SIX, SIX], [0, -17]))
    assert (inexact, made["block_scale"].float().flatten().tolist()) == (
        0,
        [256, 256, 2**-9, 2**-9],
    )
    made, inexact = cast(mx([SIX, ONE, SIX], [0, -18, -18]))  # 1 / 2 is a code, and so is 6 / 2
    assert inexact == 0
    assert nvfp4.dequantize(made)[0, 0, 32:].tolist() == [
        v * 2.0**-18 for v in [1.0, -1.0] * 16 + SIX
    ]


def test_mxfp4_that_is_too_small_rounds_half_to_even_and_is_counted():
    small = [0.5, 1.5, -0.5, -1.5, 3.0, -0.0, 0.0, 4.0] * 4
    parts = mx([SIX, small, small, ONE], [0, -18, 0, -20])
    parts["qweight"][0, 0, 16 + 2] |= 0x80  # -0.0, which encode does not make
    made, inexact = cast(parts)
    assert inexact == 2
    halves = nvfp4.dequantize(made)[0, 0, 32:40] * 2.0**17
    assert halves.tolist() == [0, 1, -0.0, -1, 1.5, 0, 0, 2]  # 0.25 to 0 and 0.75 to 1
    assert made["qweight"][0, 0, 16 + 2] >> 4 == 8
    assert same(made["qweight"][..., 32:48], parts["qweight"][..., 32:48])
    ones = made["qweight"][0, 0, 48:]
    assert (ones == 0x80).all()  # 1/8 becomes 0 and keeps its sign


def test_mxfp4_zeros_take_no_part_and_keep_their_codes():
    parts = mx([ONE, ZERO, ZERO], [0, 100, -127])
    parts["qweight"][0, 0, 16:32] = 0x80
    assert max_exponent(parts).tolist() == [0]
    made, inexact = cast(parts)
    assert inexact == 0
    assert made["block_scale"].float().flatten().tolist() == [256, 256, 1, 1, 1, 1]
    assert same(made["qweight"], parts["qweight"])
    zeros = mx([ZERO], [5])
    assert max_exponent(zeros).tolist() == [nvfp4_from_mxfp4.NO_EXPONENT]
    made, inexact = cast(zeros)
    assert (inexact, made["global_scale"].item()) == (0, 1)
    assert nvfp4_from_mxfp4.NO_EXPONENT < -127  # so that it loses against any other


@pytest.mark.parametrize("exponent", [-127, -126, -118, 0, 120, 126])
def test_mxfp4_of_every_exponent_has_a_global_scale_that_can_be_inverted(exponent):
    parts = mx([ONE], [exponent])
    made, inexact = cast(parts)
    assert inexact == 0
    assert made["global_scale"] >= TINY
    assert (1 / made["global_scale"]).isfinite()
    assert torch.equal(nvfp4.dequantize(made), mxfp4.dequantize(parts))


def test_mxfp4_extremes_in_one_matrix():
    made, inexact = cast(mx([ONE, ONE, ZERO], [126, -127, 0]))
    assert inexact == 1
    assert nvfp4.dequantize(made)[0, 0, 32:].count_nonzero() == 0


def test_mxfp4_cast_writes_into_views_and_shares_a_larger_exponent():
    parts = mx([SIX, ONE], [-3, -5])
    alone, _ = cast(parts)
    shared, _ = cast(parts, 4)
    assert torch.equal(nvfp4.dequantize(alone), nvfp4.dequantize(shared))
    out = {"qweight": np.zeros((1, 1, 64), np.uint8), "block_scale": np.zeros((1, 1, 8), np.uint8)}
    views = {"qweight": out["qweight"][..., 32:], "block_scale": out["block_scale"][..., 4:]}
    arrays = {role: tensor.numpy() for role, tensor in parts.items()}
    nvfp4_from_mxfp4.cast(arrays, np.array([4], np.int32), views)
    for role, view in views.items():
        assert view.tobytes() == shared[role].view(torch.uint8).numpy().tobytes()
    assert not out["qweight"][..., :32].any()
