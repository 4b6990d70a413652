"""Weights that are hard to round, and the Triton kernels against the torch codecs on them.

Run as a script it does so on a CPU, in Triton's interpreter, for the formats that are named, and
prints the name of each that was checked.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
from kit.with_scales import scale_for

from moe_ckpt.formats import FORMATS, find_format
from moe_ckpt.formats.amax import abs_max
from moe_ckpt.kernels import gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One format for each codec and group; bf16 has no kernel.
CODECS = [row.name for row in FORMATS if row.name not in ("bf16", "nvfp4-w4a16")]
N, K = 32, 512


def every_pattern(dtype):
    """Every finite value of 16 bits in order, [n, 512]; of float32 as many at random."""
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (1 << 16,)).to(torch.int32)
    else:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()]
    return values[: len(values) // K * K].view(-1, K)


def ties(dtype):
    """Midpoints between codes and their neighbours, at scales that are powers of two and not."""
    middles = [0.25, 0.5, 0.75, 1.25, 1.5, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 7.5, 17.0, 19.0, 432.0]
    middles += [2.0**-10, 3 * 2.0**-10, 126.5, 127.5, 0.0, -0.0]
    middle = torch.tensor(middles)[torch.randint(0, len(middles), (N, K))]
    beside = middle.nextafter(torch.tensor([torch.inf, -torch.inf])[torch.randint(0, 2, (N, K))])
    values = torch.where(torch.rand(N, K) < 0.5, middle, beside) * (
        1 - 2 * torch.randint(0, 2, (N, K))
    )
    values[:, ::128] = torch.tensor([6.0, 448.0, 127.5, 7.5]).repeat(N // 4).view(N, 1)
    scale = torch.exp2(torch.randint(-9, 4, (N, 1)).float())
    scale[N // 2 :] *= torch.rand(N // 2, 1) + 0.5
    return (values * scale).to(dtype)


def spread(dtype):
    """Rows and columns of every size, subnormal ones too, with zeros of both signs."""
    values = torch.randn(N, K) * torch.logspace(-38, 3, N).view(N, 1) * torch.logspace(-5, 0, K)
    values[:, 64:96] = 0
    values[:, 96:128] = -0.0
    values[3], values[4] = 0, -0.0
    return values.to(dtype)


def like_weights(dtype):
    return (torch.randn(N, K) * 0.02).to(dtype)


def hard(dtype):
    """Matrices [B, N, K], one after the other of the above."""
    torch.manual_seed(0)
    patterns = every_pattern(dtype)
    patterns = patterns[: len(patterns) // N * N].view(-1, N, K)
    near_one = patterns[(patterns.float().abs().amax((1, 2)) < 2**10)][
        -2:
    ]  # where scales are usual
    huge = torch.where(torch.rand(N, K) < 0.01, torch.finfo(dtype).max, 1.0).to(dtype)
    tiny = (spread(torch.float32) * 1e-37).to(dtype)
    rest = [ties(dtype), spread(dtype), like_weights(dtype), huge, tiny]
    return torch.cat((patterns, near_one, torch.stack(rest)))


def in_every_form(weight_BNK):
    """The same weights, stored in other ways."""
    B, N, K = weight_BNK.shape
    yield "contiguous", weight_BNK
    yield "transposed", weight_BNK.transpose(1, 2).contiguous().transpose(1, 2)
    rows = weight_BNK.new_zeros(B, 2 * N, K)
    rows[:, ::2] = weight_BNK
    yield "every second row", rows[:, ::2]
    columns = weight_BNK.new_zeros(B, K, 2 * N)
    columns[:, :, 1::2] = weight_BNK.transpose(1, 2)
    yield "every second column, transposed", columns[:, :, 1::2].transpose(1, 2)
    shifted = weight_BNK.new_zeros(B * N * K + 1)
    shifted[1:] = weight_BNK.flatten()
    yield "at an odd offset", shifted[1:].view(B, N, K)
    odd = weight_BNK.new_zeros(B, N, K + 1)
    odd[..., :K] = weight_BNK
    yield "rows at odd offsets", odd[..., :K]


def differences(row, weight_BNK, stored):
    """Roles whose bytes the kernels make differently, and 'amax': ``stored`` is on any device."""
    amax_BN = abs_max(weight_BNK)
    scale = scale_for(row, amax_BN if row.amax_of_rows else amax_BN.amax(1))
    want = row.codec().quantize(weight_BNK, scale)
    codec = row.module
    scale = None if scale is None else scale.to(stored.device)
    out = {role: torch.empty_like(part, device=stored.device) for role, part in want.items()}
    for part in out.values():
        part.view(torch.uint8).fill_(0xA5)
    gpu.quantize(codec, stored, scale, out)
    found = [
        role
        for role, part in want.items()
        if not torch.equal(out[role].cpu().view(torch.uint8), part.view(torch.uint8))
    ]
    return found if torch.equal(gpu.row_amax(stored).cpu(), amax_BN) else [*found, "amax"]


# Several programs find the amax of a row: from 1,024 columns on if transposed, else from 8,192.
LONG = [(2, 2_100), (2, 9_000)]


def ragged_sizes(row):
    """[N, K] that fill no tile."""
    if row.n_multiple > 1 or row.k_multiple == 1:  # the codec of tiles takes edges too
        return [(1, 1), (37, 301), (129, 130), *(LONG if row.name == "fp8-tensor" else [])]
    return [(1, row.k_multiple), (37, 3 * row.k_multiple)]


def check(row, device):
    """Lines that say what differs. On a CPU, for the interpreter is slow, less of it."""
    for dtype in DTYPES:
        weights = hard(dtype)
        cases = [("hard", weights, weights.to(device))]
        if device != "cpu" or dtype == torch.bfloat16:
            some = weights[-5:-3]
            cases += [(form, some, stored) for form, stored in in_every_form(some.to(device))]
        for n, k in ragged_sizes(row):
            w = (torch.randn(2, n, k) * torch.logspace(-3, 2, k)).to(dtype)
            forms = list(in_every_form(w.to(device)))
            if device == "cpu":  # the last size has a program for each 64 columns if transposed
                forms = forms[dtype != torch.bfloat16 : 1 if (n, k) == LONG[-1] else 2]
            cases += [(f"{n}x{k} {form}", w, stored) for form, stored in forms]
        for form, want, stored in cases:
            assert torch.equal(stored.cpu(), want)
            if found := differences(row, want, stored):
                yield f"{row.name} {dtype} {form}: {found}"


def interpret():
    """What the interpreter lacks: a fused multiply-add that rounds once, as float64 nearly does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(_self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma
    np.seterr(all="ignore")


if __name__ == "__main__":
    interpret()
    lines = []
    for name in sys.argv[1:]:
        lines += check(find_format(name), "cpu")
        print(name)  # noqa: T201
    sys.exit("\n".join(lines) or None)
