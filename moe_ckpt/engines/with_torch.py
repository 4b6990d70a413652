"""The codecs of `moe_ckpt.formats`, on a CPU or on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import show
from ..formats import QuantFormat, e8m0, find_format
from ..formats.amax import abs_max
from ..formats.scratch import Scratch
from ..source.stored import Encoded
from .engine import Backend

__all__ = ["TorchEngine", "backend", "cpu_engine", "cuda_devices", "kernels_for"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}


_CPU_CHUNK_ITEMS = 1 << 18  # the temporaries should stay in the cache
_CUDA_CHUNK_ITEMS = 1 << 24


def cuda_devices() -> int:
    """How many CUDA devices torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def backend(device: str, note: str = "") -> Backend:
    """Torch on "cpu", "cuda" or "cuda:N"; ``note`` is what a user should know of the choice."""
    if device == "cpu":
        make = partial(TorchEngine, torch.device(device))
        return Backend(device, make, _CPU_CHUNK_ITEMS, _one_thread, note)
    kernels, why = kernels_for(torch.device(device))
    make = partial(TorchEngine, torch.device(device), kernels)
    return Backend(device, make, _CUDA_CHUNK_ITEMS, _one_thread, why)


def cpu_engine() -> TorchEngine:
    """Torch on the CPU."""
    return TorchEngine(torch.device("cpu"))


def kernels_for(device: torch.device) -> tuple[ModuleType | None, str]:
    """Triton's, if they run; else why not."""
    try:
        from ..kernels import gpu

        gpu.row_amax(torch.zeros(1, 1, 16, dtype=torch.bfloat16, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  what it needs beside itself is found by trying
        return None, f"Triton cannot be used ({show(error)}); torch does the arithmetic, slower"
    return gpu, ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Our threads are the parallelism: torch's own would contend with them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchEngine:
    """Torch on one device; on CUDA with a stream of its own, so that engines overlap."""

    out_of_memory: type[Exception] = torch.OutOfMemoryError

    def __init__(self, device: torch.device, kernels: ModuleType | None = None) -> None:
        self._device = device
        self._kernels = kernels
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._scratch = Scratch(device)
        self._buffers: dict[str, torch.Tensor] = {}

    def release(self) -> None:
        """Forget the buffers, and give torch's cache back to the device."""
        self._buffers.clear()
        self._scratch = Scratch(self._device)
        if self._cuda:
            torch.cuda.empty_cache()

    def host(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        """A buffer on the host, pinned if the device is CUDA."""
        found = self._buffers.get(name)
        if found is None or found.numel() < nbytes:
            found = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda)
            self._buffers[name] = found
        buffer: NDArray[np.uint8] = found.numpy()[:nbytes]
        return buffer

    def weights(self, stored: NDArray[Any]) -> torch.Tensor:
        """Stored floats on the device."""
        dtype = "BF16" if stored.dtype == np.uint16 else ""
        with self._on_stream():
            return _tensor(stored, dtype).to(self._device, non_blocking=True)

    def empty(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An array of float32 on the device."""
        with self._on_stream():
            return self._scratch.empty(name, shape, torch.float32)

    def decode(
        self, encoded: Encoded, parts: Mapping[str, NDArray[Any]], out: torch.Tensor, skip: int
    ) -> None:
        """Put the weights that parts stand for, but ``skip`` rows, into ``out``."""
        dtypes = {part.role: part.dtype for part in encoded.parts}
        with self._on_stream():
            found = {}
            for role, items in parts.items():
                dtype = dtypes.get(role, "")
                found[role] = _tensor(items, dtype).to(self._device, non_blocking=True)
                if dtype == "F8_E8M0" and not encoded.format.startswith("mx"):
                    found[role] = e8m0.decode(found[role])
            out.copy_(find_format(encoded.format).codec().dequantize(found)[:, skip:])
            if self._stream:
                self._stream.synchronize()

    def numbers(self, weights: torch.Tensor) -> NDArray[np.float32]:
        """The values of weights, on the host."""
        with self._on_stream():
            values: NDArray[np.float32] = weights.float().cpu().numpy()
            return values

    def largest(self, weights: torch.Tensor, axis: int) -> NDArray[np.float32]:
        """Largest magnitudes along an axis."""
        with self._on_stream():
            if self._kernels:
                largest = self._kernels.row_amax(weights if axis == 2 else weights.swapaxes(1, 2))
            else:
                largest = abs_max(weights, self._scratch, axis)
            found: NDArray[np.float32] = largest.cpu().numpy()
            return found

    def quantize(
        self,
        target: QuantFormat,
        weight_BNK: torch.Tensor,
        scale: NDArray[np.float32] | None,
        out: Mapping[str, NDArray[Any]],
    ) -> None:
        """Put the parts with rows into ``out``."""
        dtypes = {part.role: part.dtype for part in target.parts}
        results = {role: _tensor(items, dtypes[role]) for role, items in out.items()}
        name = target.module
        with self._on_stream():
            scales = None if scale is None else torch.from_numpy(scale).to(self._device)
            if self._kernels and name in self._kernels.FORMATS:
                made = {
                    role: self._scratch.empty(f"made {role}", tuple(result.shape), result.dtype)
                    for role, result in results.items()
                }
                self._kernels.quantize(name, weight_BNK, scales, made)
            else:
                if not weight_BNK.is_contiguous():
                    weight_BNK = self._in_order(weight_BNK)
                into = None if self._cuda else results
                made = target.codec().quantize(weight_BNK, scales, into, self._scratch)
            if self._stream:
                for role, result in results.items():
                    result.copy_(made[role], non_blocking=True)
                self._stream.synchronize()

    def _on_stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _in_order(self, chunk_BNK: torch.Tensor) -> torch.Tensor:
        """The chunk with its rows one after another, in scratch memory."""
        shape = tuple(chunk_BNK.shape)
        rows = self._scratch.empty("rows", shape, chunk_BNK.dtype)
        if chunk_BNK.stride(2) == 1:
            return rows.copy_(chunk_BNK)
        # A transposed read strides over whole stored rows, which evict each other from the cache:
        # 20 times slower than to bring the columns together first.
        B, N, K = shape
        columns_BKN = self._scratch.empty("columns", (B, K, N), chunk_BNK.dtype)
        columns_BKN.copy_(chunk_BNK.transpose(1, 2))
        if B == 1:
            rows[0].copy_(columns_BKN[0].t())  # two dimensions have a kernel of their own
        else:
            rows.copy_(columns_BKN.transpose(1, 2))
        return rows


def _tensor(items: NDArray[Any], dtype: str) -> torch.Tensor:
    """A tensor on the same memory; numpy's own type without a dtype of safetensors."""
    if items.dtype == np.uint16:  # of which torch knows little
        items = items.view(np.int16)
    tensor = torch.from_numpy(items)
    return tensor.view(_DTYPES[dtype]) if dtype else tensor
