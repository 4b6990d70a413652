"""NVFP4 under another global scale: exact where it can be, and near where it cannot."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ckpt.formats import e2m1, nvfp4
from moe_ckpt.formats.nvfp4_rescaled import exact_scales, rescale

VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def matrices(seed, count=3, n=4, k=64, least=0):
    """Codes of all kinds and scales of all bytes, some blocks of zeros among them."""
    numbers = np.random.default_rng(seed)
    qweight = numbers.integers(0, 256, (count, n, k // 2)).astype(np.uint8)
    scale = numbers.integers(least, 127, (count, n, k // 16)).astype(np.uint8)
    qweight.reshape(count, n, -1, 8)[:, 0, 0] = 0x80  # zeros, one of each two with a sign
    return {"qweight": qweight, "block_scale": scale}


def decoded(parts, global_scale):
    return nvfp4.dequantize(
        {
            "qweight": torch.from_numpy(parts["qweight"]),
            "block_scale": torch.from_numpy(parts["block_scale"]).view(torch.float8_e4m3fn),
            "global_scale": torch.tensor(global_scale, dtype=torch.float32),
        }
    )


def whole(parts, scale):
    """The weights as fractions, [blocks, 16] for each matrix."""
    codes = np.stack((parts["qweight"] & 15, parts["qweight"] >> 4), -1)
    codes = codes.reshape(*parts["block_scale"].shape, 16)
    return [
        [
            [
                Fraction((-1 if code & 8 else 1) * MAGNITUDES[code & 7])
                * Fraction(VALUES[byte])
                * Fraction(float(scale[b]))
                for code in block
            ]
            for row, bytes_ in zip(codes[b], parts["block_scale"][b], strict=True)
            for block, byte in zip(row, bytes_, strict=True)
        ]
        for b in range(len(codes))
    ]


def copy_of(parts):
    return {role: items.copy() for role, items in parts.items()}


positive = st.floats(2.0**-100, 2.0**20, width=32, exclude_min=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(positive, positive), min_size=2, max_size=2))
def test_what_is_counted_as_exact_is_and_nothing_is_far(seed, ratios):
    """Against fractions: no weight of an exact block moves, and the rest move within bounds."""
    before = matrices(seed, len(ratios), 2, 32)
    own = np.array([min(pair) for pair in ratios], np.float32)
    shared = np.array([max(pair) for pair in ratios], np.float32)
    after = copy_of(before)
    count = rescale(after, own, shared)
    moved = 0
    for b, (was, now) in enumerate(zip(whole(before, own), whole(after, shared), strict=True)):
        old_scales = before["block_scale"][b].reshape(-1)
        for position, (old, new) in enumerate(zip(was, now, strict=True)):
            moved += old != new
            wanted = Fraction(VALUES[old_scales[position]]) * Fraction(float(own[b]))
            step = max(wanted / 16, Fraction(float(shared[b])) * Fraction(1, 1024))
            bound = 6 * step + Fraction(float(shared[b])) * Fraction(1, 512)
            assert all(abs(x - y) <= bound for x, y in zip(old, new, strict=True))
    assert count == moved


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8), positive)
def test_a_power_of_two_moves_no_weight(seed, exponent, own):
    """As floats too, in the order in which runtimes multiply."""
    least = (exponent + 1) * 8  # a normal number that stays one
    before = matrices(seed, 1, least=least)
    shared = np.ldexp(np.float32(own), exponent)
    after = copy_of(before)
    assert rescale(after, np.float32([own]), np.float32([shared])) == 0
    assert np.array_equal(after["qweight"], before["qweight"])
    assert torch.equal(decoded(after, shared), decoded(before, own))


def test_codes_are_those_of_quantizing_the_weights_again():
    """Wherever the largest code of a block is 6, which is where amax made its scale."""
    before = matrices(7, 2, 8, 64, least=8)
    before["qweight"].reshape(2, 8, -1, 8)[..., 0] |= 0x07
    own, shared = np.float32([0.7, 0.001]), np.float32([1.0, 0.009])
    after = copy_of(before)
    rescale(after, own, shared)
    weights = torch.stack(
        [decoded({k: v[b : b + 1] for k, v in before.items()}, own[b])[0] for b in range(2)]
    )
    theirs = nvfp4.quantize(weights, torch.from_numpy(shared))
    scales = theirs["block_scale"].view(torch.uint8).numpy()
    live = before["qweight"].reshape(2, 8, -1, 8).any(-1)
    assert np.array_equal(after["block_scale"][live], scales[live])
    ours = e2m1.decode(torch.from_numpy(after["qweight"]))
    assert torch.equal(ours, e2m1.decode(theirs["qweight"]))


def test_blocks_of_zeros_and_scales_of_zero_stay():
    before = matrices(3, 1)
    before["block_scale"][0, 1, 1] = 0
    after = copy_of(before)
    rescale(after, np.float32([0.3]), np.float32([1.0]))
    assert after["block_scale"][0, 0, 0] == before["block_scale"][0, 0, 0]
    assert after["block_scale"][0, 1, 1] == 0
    assert np.array_equal(after["qweight"][0, 1, 8:16], before["qweight"][0, 1, 8:16])


@pytest.mark.parametrize(("own", "shared"), [(0.5, 1.0), (0.75, 1.0), (0.7, 1.0), (1e-30, 1.0)])
def test_scales_that_e4m3_holds_are_known_without_codes(own, shared):
    (exact,) = exact_scales(np.float32([own]), np.float32([shared]))
    there = {Fraction(value) for value in VALUES}
    for byte, value in enumerate(VALUES):
        wanted = Fraction(value) * Fraction(float(np.float32(own)))
        assert exact[byte] == (wanted in there)


def test_signs_stay_and_codes_have_the_values_that_are_used_here():
    assert e2m1.decode(torch.arange(8, dtype=torch.uint8).view(1, 8)).tolist()[0][::2] == MAGNITUDES
