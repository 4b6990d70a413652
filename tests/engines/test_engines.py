"""Numba and torch make the same bytes, with any number of workers and any memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.command import run_cli
from kit.files import FIXTURES, read_files
from kit.whole_plans import CASES, SOURCES, TARGETS, planned
from kit.with_scales import amax_for

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import Backend, backend_for, with_torch
from moe_ckpt.errors import EnvironmentFaultError, UsageError
from moe_ckpt.formats import FORMATS, find_format
from moe_ckpt.formats.scales import scale_of
from moe_ckpt.limits import Limits
from moe_ckpt.source.items import DTYPES
from moe_ckpt.source.stored import Encoded
from moe_ckpt.work.batches import Budget, budget_for

with_numba = pytest.importorskip("moe_ckpt.engines.with_numba")

NUMBA, TORCH = with_numba.backend(), with_torch.backend("cpu")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def stored(weight):
    """Weights as numpy has them."""
    if weight.dtype == torch.bfloat16:
        return weight.contiguous().view(torch.int16).numpy().view(np.uint16)
    return weight.contiguous().numpy()


def quantized(engine, row, weight, scale, order="C"):
    """The bytes of every part, by role, from weights in this order of N and K."""
    B, N, K = weight.shape
    items = stored(weight)
    if order == "F":
        items = np.ascontiguousarray(items.swapaxes(1, 2)).swapaxes(1, 2)
    if order == "alternating":
        twice = np.zeros((B, 2 * N, K), items.dtype)
        twice[:, 1::2] = items
        items = twice[:, 1::2]
    out = {
        part.role: np.full((B, *part.shape(N, K)), 0x55, DTYPES[part.dtype])
        for part in row.parts
        if not part.is_scalar
    }
    engine.quantize(row, engine.weights(items), scale, out)
    return {role: items.tobytes() for role, items in out.items()}


def scale_for(row, weight):
    return scale_of(amax_for(row, weight).numpy(), row.largest) if row.largest else None


def adversarial(dtype):
    """Ties, negative zeros, subnormals, matrices of zeros, and every magnitude."""
    torch.manual_seed(0)
    grid = torch.tensor([0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 448.0, 464.0])
    w = grid[torch.randint(0, 12, (8, 130, 256))] * torch.randint(-1, 2, (8, 130, 256))
    exponents = (-42, 33) if dtype != torch.float16 else (-7, 2)
    w *= torch.logspace(*exponents, 8).view(-1, 1, 1)
    w[3] = -0.0
    w[4, :, ::7] = torch.randn(130, 37) * (1e30 if dtype != torch.float16 else 60000)
    w[5, 0] = 0
    return w.to(dtype).nan_to_num(posinf=60000, neginf=-60000)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", ["C", "F", "alternating"])
def test_the_same_bytes_of_adversarial_weights(row, dtype, order):
    weight = adversarial(dtype)
    scale = scale_for(row, weight)
    made = quantized(NUMBA.make(), row, weight, scale, order)
    assert made == quantized(TORCH.make(), row, weight, scale, order)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_the_same_bytes_of_every_bfloat16(row):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    for values in (every, mixed):
        weight = values[: len(values) // 256 * 256].view(1, -1, 256)
        scale = scale_for(row, weight)
        made = quantized(NUMBA.make(), row, weight, scale)
        assert made == quantized(TORCH.make(), row, weight, scale)


@given(st.data())
def test_the_same_bytes_of_any_shape(data):
    row = data.draw(st.sampled_from(FORMATS))
    B, N = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 140))
    step = 1 if row.name == "fp8-block" else row.k_multiple
    K = step * data.draw(st.integers(1, max(1, 300 // step)))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(B, N, K, generator=seed) * torch.randn(B, N, 1, generator=seed).exp()
    weight = weight.to(data.draw(st.sampled_from(FLOATS)))
    order = data.draw(st.sampled_from(["C", "F", "alternating"]))
    scale = scale_for(row, weight)
    made = quantized(NUMBA.make(), row, weight, scale, order)
    assert made == quantized(TORCH.make(), row, weight, scale, order)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -float("inf")])
def test_largest_magnitudes(dtype, axis, bad):
    weight = adversarial(dtype)
    weight[2, 5, 7] = bad
    found = [b.make().largest(b.make().weights(stored(weight)), axis) for b in (NUMBA, TORCH)]
    want = weight.float().abs().amax(axis).numpy()
    finite = np.isfinite(want)
    for amax in found:
        assert amax.dtype == np.float32
        assert (np.isfinite(amax) == finite).all()
        assert (amax[finite] == want[finite]).all()


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("nvfp4", {"block_scale": "F8_E4M3", "global_scale": "F32"}),
        ("nvfp4", {"block_scale": "F8_E4M3", "global_divisor": "F32"}),
        ("mxfp4", {"block_scale": "U8"}),
        ("mxfp8", {"block_scale": "F8_E8M0"}),
        ("int4-g32", {"block_scale": "BF16"}),
        ("int4-g128", {"block_scale": "F16"}),
        ("fp8-block", {"block_scale": "F32"}),
        ("fp8-block", {"block_scale": "BF16"}),
        ("fp8-block", {"block_scale": "F8_E8M0"}),
        ("fp8-channel", {"channel_scale": "F32"}),
        ("fp8-channel", {"channel_scale": "BF16"}),
        ("fp8-tensor", {"global_scale": "F32"}),
        ("int8-channel", {"channel_scale": "F16"}),
    ],
)
def test_the_same_decoded_weights(name, roles):
    row, random = find_format(name), np.random.default_rng(0)
    B, N, K = 3, 130, 256
    parts, described = {}, []
    for part in row.parts:
        dtype = roles.get(part.role.replace("scale", "divisor"), roles.get(part.role, part.dtype))
        if part.role == "input_scale":
            continue
        kind = np.dtype(DTYPES[dtype])
        shape = (B, *part.shape(N, K))
        if part.role == "qweight" or kind == np.uint8:
            items = random.integers(0, 256, (*shape, kind.itemsize), np.uint8).view(kind)[..., 0]
            low = {"U8": 0, "F8_E8M0": 100}.get(dtype, 0)
            if part.role != "qweight":
                items = items % 27 + low
        else:
            items = random.random(shape, np.float32).astype(kind)
            if dtype == "BF16":
                items = (random.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        role = part.role
        if role.replace("scale", "divisor") in roles:
            role = role.replace("scale", "divisor")
        parts[role] = items
        described.append(type(part)(part.role, dtype, part.columns, part.rows))
    encoded = Encoded(name, tuple(described))
    skip = 3
    ours, theirs = (np.empty((B, N - skip, K), np.float32) for _ in range(2))
    NUMBA.make().decode(encoded, parts, ours, skip)
    TORCH.make().decode(encoded, parts, torch.from_numpy(theirs), skip)
    nothing = np.isnan(theirs)
    assert nothing.any() == (row.parts[0].dtype == "F8_E4M3")
    assert (np.isnan(ours) == nothing).all()
    assert (ours.view(np.uint32) == theirs.view(np.uint32))[~nothing].all()


@pytest.mark.parametrize(
    ("model", "row", "quantize", "experts"), CASES, ids=lambda x: getattr(x, "name", x)
)
def test_the_same_files_with_any_engine_workers_and_memory(tmp_path, model, row, quantize, experts):
    plan = planned(model, row, quantize=quantize, experts=experts)
    execute(plan, tmp_path / "a", backend=NUMBA)
    execute(plan, tmp_path / "b", backend=TORCH, budget=Budget(20_000, 5_000, 3))
    execute(plan, tmp_path / "c", backend=NUMBA, budget=Budget(3_000, 1_000, 1))
    first = read_files(tmp_path / "a")
    assert first == read_files(tmp_path / "b") == read_files(tmp_path / "c")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_same_files_from_quantized_sources(tmp_path, source, target):
    execute(
        planned("qwen3_moe_wide", find_format(source), quantize="linear"),
        tmp_path / "in",
        backend=NUMBA,
    )
    plan = moe_ckpt.make_plan(
        tmp_path / "in", format=target, quantize="linear", allow_requantize=True
    )
    execute(plan, tmp_path / "a", backend=NUMBA)
    execute(plan, tmp_path / "b", backend=TORCH, budget=Budget(20_000, 1 << 12, 2))
    execute(plan, tmp_path / "c", backend=NUMBA, budget=Budget(50_000, 1 << 10, 2))
    first = read_files(tmp_path / "a")
    assert first == read_files(tmp_path / "b") == read_files(tmp_path / "c")


WITHOUT_NUMBA = (
    "import sys; sys.modules['numba'] = None; sys.argv[0] = 'moe-ckpt';"
    "from moe_ckpt.cli.process import main; main()"
)


def test_without_numba_it_is_torch_and_says_what_is_missed(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    with_it = run_cli("convert", source, tmp_path / "with", "--workers", 3, "--memory", "1MiB")
    assert with_it.returncode == 0, with_it.stderr
    assert "moe-ckpt[fast]" not in with_it.stderr
    without = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA, "convert", source, tmp_path / "without"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert without.returncode == 0, without.stderr
    assert "moe-ckpt[fast]" in without.stderr
    assert read_files(tmp_path / "with") == read_files(tmp_path / "without")


def test_a_numba_that_does_not_import_is_a_note(tmp_path):
    """As for a numpy that is newer than it knows."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    source, path = FIXTURES / "qwen3_moe" / "source", f"{tmp_path}:{Path(__file__).parents[2]}"
    done = run_cli("convert", source, tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "numba cannot be used (Numba needs NumPy 1.0 or less)" in done.stderr


def test_with_numba_torch_is_not_imported(tmp_path):
    code = (
        "import sys, moe_ckpt; moe_ckpt.convert(sys.argv[1], sys.argv[2], device='cpu');"
        "print('torch' in sys.modules)"
    )
    source = FIXTURES / "qwen3_moe" / "source"
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_kernels_compile_where_nothing_can_be_kept(tmp_path):
    """numba keeps what it compiled beside the module or in the user's cache, if it may."""
    code = "import moe_ckpt.kernels.elements as e; print(e.compiled(lambda x: x + 1)(1))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.dont_write_bytecode = True; exec({code!r})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "2\n", done.stderr


COMPILES = """
import moe_ckpt.kernels.elements as elements
def more(x):
    return x + 1
print(elements.compiled(more)(1))
"""


@pytest.mark.parametrize("damage", [b"", b"x", b"\x80\x04", None])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    """What a power cut leaves of it; None: as it was, so that it is known to be read."""
    (tmp_path / "more.py").write_text(COMPILES)
    cache = tmp_path / "cache"
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMBA_DEBUG_CACHE": "1"}
    for _ in range(2):
        args = [sys.executable, tmp_path / "more.py"]
        done = subprocess.run(args, capture_output=True, text=True, check=False, env=env)
        assert done.stdout.splitlines()[-1] == "2", done.stderr
        kept = [path for path in cache.rglob("*") if path.suffix in (".nbi", ".nbc")]
        assert len(kept) == 2
        for path in kept if damage is not None else ():
            path.write_bytes(damage)
    assert ("data loaded" in done.stdout) == (damage is None)


def test_a_full_disk_of_the_cache_stops_no_conversion(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "more.py").write_text(COMPILES)
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {tmp_path}/disk && "
        f"{{ head -c 100000 /dev/zero > {tmp_path}/disk/fill; "
        f"NUMBA_CACHE_DIR={tmp_path}/disk {sys.executable} {tmp_path}/more.py; }}"
    )
    args = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no small file system can be made here")
    assert "No space left on device" in done.stderr  # the filler's
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


class Cramped(with_torch.TorchEngine):
    """A device with room for few weights at once: what CUDA raises when its memory is full."""

    room = 3000
    refused = 0

    def weights(self, stored):
        if stored.size > self.room:
            type(self).refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().weights(stored)


@pytest.mark.parametrize("model", ["qwen3_moe", "llama4"])
@pytest.mark.parametrize("experts", ["split", "fused"])
def test_without_room_on_the_device_batches_are_halved(tmp_path, model, experts):
    if (model, experts) == ("qwen3_moe", "fused"):
        pytest.skip("no runtime reads that")
    plan = planned(model, find_format("nvfp4"), experts=experts)
    execute(plan, tmp_path / "a", backend=NUMBA)
    Cramped.refused, Cramped.room = 0, 9_000
    small = Backend("cpu", lambda: Cramped(torch.device("cpu")), 1 << 18)
    execute(plan, tmp_path / "b", backend=small, budget=Budget(1 << 20, 1 << 18, 2))
    assert Cramped.refused
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_without_room_for_anything_it_says_so(tmp_path):
    plan = planned("qwen3_moe", find_format("nvfp4"))
    Cramped.room = 1
    small = Backend("cpu", lambda: Cramped(torch.device("cpu")), 1 << 18)
    with pytest.raises(EnvironmentFaultError, match="GPU memory ran out"):
        execute(plan, tmp_path / "b", backend=small, budget=Budget(1 << 20, 1 << 18, 2))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options", [["--workers", "0"], ["--workers", "x"], ["--memory", "much"], ["--memory", "0"]]
)
def test_limits_that_are_none_are_refused(tmp_path, options):
    done = run_cli("convert", FIXTURES / "qwen3_moe" / "source", tmp_path / "out", *options)
    assert done.returncode == 2
    assert options[0] in done.stderr or "size" in done.stderr
    assert not (tmp_path / "out").exists()


@given(
    st.integers(1, 64), st.integers(1, 1 << 34), st.integers(0, 1 << 30), st.sampled_from([0, 1])
)
def test_budgets_stay_within_the_memory(workers, memory, gathered, cuda):
    backend = Backend("cuda" if cuda else "cpu", NUMBA.make, 1 << 20)
    budget = budget_for(backend, Limits(workers, memory, memory), gathered)
    assert 1 <= budget.workers <= workers
    assert 1 << 16 < budget.stage_nbytes <= 16 << 20
    if budget.workers > 1:
        assert budget.workers * (3 * budget.stage_nbytes + gathered) <= memory


def test_more_memory_never_means_smaller_buffers():
    found = [budget_for(NUMBA, Limits(4, nbytes)) for nbytes in range(1 << 20, 1 << 28, 1 << 20)]
    sizes = [budget.workers * budget.stage_nbytes for budget in found]
    assert sizes == sorted(sizes)
    assert found[0].workers == 1
    assert found[-1].workers == 4


def test_the_plan_tells_the_memory(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    found = []
    for size in ("64MiB", "1GiB"):
        done = run_cli("convert", source, tmp_path / "o", "--dry-run", "--json", "--memory", size)
        found.append(json.loads(done.stdout)["peak_memory_nbytes"])
    assert found[1] - found[0] == (1 << 30) - (64 << 20)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "auto:1", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UsageError, match="device"):
        backend_for(name)


def test_without_a_gpu_for_triton_torch_does_it_and_says_why():
    kernels, why = with_torch.kernels_for(torch.device("cpu"))
    assert kernels is None
    assert why.startswith("Triton cannot be used (")
    assert "\n" not in why


def test_a_triton_that_flushes_quotients_is_not_used(monkeypatch):
    triton = pytest.importorskip("triton")
    kernels = importlib.import_module("moe_ckpt.kernels")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    monkeypatch.delitem(sys.modules, "moe_ckpt.kernels.gpu", raising=False)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    found, why = with_torch.kernels_for(torch.device("cpu"))
    assert found is None
    assert "it is 3.5.1" in why
    assert "3.6" in why


@pytest.mark.parametrize("name", ["nvfp4", "fp8-channel", "int4-g32"])
def test_formats_without_a_kernel_are_left_to_torch(monkeypatch, name):
    row = find_format(name)
    there = importlib.import_module(f"moe_ckpt.formats.{row.module}")
    monkeypatch.setitem(sys.modules, "moe_ckpt.formats.elsewhere", there)
    moved = replace(row, module="elsewhere")
    weight = adversarial(torch.bfloat16)
    scale = scale_for(row, weight)
    assert quantized(NUMBA.make(), moved, weight, scale, "F") == quantized(
        TORCH.make(), row, weight, scale
    )
