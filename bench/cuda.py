"""What is measured inside a process that has CUDA; each function runs in one of its own.

They return plain values, empty where torch finds no device.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["conversions", "kernel", "limits", "quantizer"]

Figure = dict[str, Any]
_TRANSFER_NBYTES = 1 << 30
_DEVICE_NBYTES = 4 << 30
# Formats whose scale needs the amax of the whole matrix: weights must be read twice.
_TWO_PASSES = ("nvfp4", "nvfp4-w4a16", "fp8-tensor")


def limits(rounds: int) -> list[Figure]:
    """PCIe with pinned memory, one way and both at once, and device memory."""
    import torch

    if not torch.cuda.is_available():
        return []
    host = [torch.ones(_TRANSFER_NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.ones(_TRANSFER_NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    side = torch.cuda.Stream()

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host[1].copy_(device[1], non_blocking=True)
        device[0].copy_(host[0], non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)

    big = [torch.ones(_DEVICE_NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "PCIe to the device": (
            lambda: device[0].copy_(host[0], non_blocking=True),
            _TRANSFER_NBYTES,
        ),
        "PCIe from the device": (
            lambda: host[0].copy_(device[0], non_blocking=True),
            _TRANSFER_NBYTES,
        ),
        "PCIe both ways, sum": (both, 2 * _TRANSFER_NBYTES),
        "device memory, copy, read and written": (lambda: big[0].copy_(big[1]), 2 * _DEVICE_NBYTES),
        "device memory, fill": (lambda: big[0].fill_(1), _DEVICE_NBYTES),
    }
    figures = []
    for name, (task, nbytes) in cases.items():
        best, middle = _seconds(task, max(rounds, 5))
        remark = f"median {nbytes / middle / 1e9:.1f}"
        figures.append(
            {"what": name, "value": nbytes / best / 1e9, "unit": "GB/s", "remark": remark}
        )
    return figures


def kernel(number_format: str, experts: int, n: int, k: int, rounds: int) -> Figure:
    """amax and quantize of a batch of matrices that is on the device.

    ``nbytes`` are those that must be moved: weights read once, or twice where the scale needs the
    amax of the whole matrix, and all parts written.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    generator = torch.Generator("cuda").manual_seed(0)
    weight_BNK = torch.empty((experts, n, k), dtype=torch.bfloat16, device="cuda")
    weight_BNK.normal_(0, 0.02, generator=generator)
    task, parts = quantizer(number_format, weight_BNK)
    written = sum(part.numel() * part.element_size() for part in parts.values())
    read = weight_BNK.numel() * 2
    nbytes = read * (2 if number_format in _TWO_PASSES else 1) + written
    best, middle = _seconds(task, rounds)
    return {"nbytes": nbytes, "input_nbytes": read, "seconds": best, "median_seconds": middle}


def quantizer(
    number_format: str, weight_BNK: torch.Tensor
) -> tuple[Callable[[], object], dict[str, torch.Tensor]]:
    """What finds amax and quantizes as a conversion does, into tensors that are there already.

    Scales of whole matrices and rows are made before: a conversion makes them on the host.
    """
    import torch

    from moe_ckpt.engines.with_torch import kernels_for
    from moe_ckpt.formats import find_format
    from moe_ckpt.formats.amax import abs_max
    from moe_ckpt.formats.scales import scale_of
    from moe_ckpt.formats.scratch import Scratch

    row = find_format(number_format)
    name = row.module
    codec, scratch = row.codec(), Scratch(weight_BNK.device)
    kernels = kernels_for(weight_BNK.device)[0] if weight_BNK.is_cuda else None
    scale = None
    if row.largest:
        amax_BN = abs_max(weight_BNK)
        amax = (amax_BN if row.amax_of_rows else amax_BN.amax(1)).cpu().numpy()
        scale = torch.from_numpy(scale_of(amax, row.largest)).to(weight_BNK.device)
    made = codec.quantize(weight_BNK, scale, None, scratch)
    parts = {role: part.clone() for role, part in made.items()}  # one may be the scale itself

    def quantize() -> None:
        if kernels and name in kernels.FORMATS:
            kernels.row_amax(weight_BNK)
            kernels.quantize(name, weight_BNK, scale, parts)
        else:
            abs_max(weight_BNK, scratch)
            codec.quantize(weight_BNK, scale, parts, scratch)

    return quantize, parts


def conversions(source: str, out: str, times: int, options: dict[str, Any]) -> Figure:
    """Convert several times in this process: the first pays for CUDA's start and for compilers.

    ``device_nbytes`` is what torch had reserved at most.
    """
    import torch

    import moe_ckpt

    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        moe_ckpt.convert(source, out, **options)
        seconds.append(time.perf_counter() - started)
        nbytes = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        shutil.rmtree(out)
    reserved = torch.cuda.max_memory_reserved()
    return {"seconds": seconds, "device_nbytes": reserved, "output_nbytes": nbytes}


def _seconds(task: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Best and median time on the device, after runs to warm up."""
    import torch

    for _ in range(3):
        task()
    spent = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        stop.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(stop) / 1e3)
    return min(spent), sorted(spent)[len(spent) // 2]
