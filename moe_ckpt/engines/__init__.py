"""Who does the arithmetic: torch on any device, or numba on a CPU. The bytes are the same.

An engine is one thread's. It takes bytes from the host and gives bytes to the host; between, its
arrays are torch tensors or numpy arrays, of which callers use only shapes, slices and `swapaxes`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import EnvironmentFaultError, UsageError, show
from ..formats import QuantFormat
from ..source.items import DTYPES
from ..source.stored import Encoded

__all__ = ["Backend", "Engine", "backend_for", "host_items"]

Array = Any


class Engine(Protocol):
    """The arithmetic of one thread, and its buffers.

    ``out_of_memory``: what it raises when there is no room for its arrays.
    """

    out_of_memory: type[Exception]

    def release(self) -> None:
        """Give back all memory that no caller uses."""

    def host(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        """A buffer on the host; the one of this name before is overwritten."""

    def weights(self, stored: NDArray[Any]) -> Array:
        """Stored floats on the device.

        Their host buffer must stay until `largest`, `numbers` or `quantize` has used them.
        """

    def empty(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array of float32 on the device; the one of this name before is overwritten."""

    def decode(
        self, encoded: Encoded, parts: Mapping[str, NDArray[Any]], out: Array, skip: int
    ) -> None:
        """Put the weights that parts stand for, but ``skip`` rows, into ``out`` [B, rows, K].

        ``out`` is a slice of what `empty` gave. Scalars are [B]; a role that ends in "divisor"
        holds the reciprocal of its scale. The parts are free afterwards.
        """

    def numbers(self, weights: Array) -> NDArray[np.float32]:
        """The values of weights, on the host."""

    def largest(self, weights: Array, axis: int) -> NDArray[np.float32]:
        """Largest magnitudes along axis 1 or 2 of [B, rows, columns].

        Not finite exactly where a weight is not.
        """

    def quantize(
        self,
        target: QuantFormat,
        weight_BNK: Array,
        scale: NDArray[np.float32] | None,
        out: Mapping[str, NDArray[Any]],
    ) -> None:
        """Put the parts with rows, by role, of weights in any order into ``out``.

        ``scale`` as in `formats.Codec.quantize`.
        """


def host_items(engine: Engine, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The host buffer of a name, as items of a dtype of safetensors."""
    kind = np.dtype(DTYPES[dtype])
    return engine.host(name, prod(shape) * kind.itemsize).view(kind).reshape(shape)


@dataclass(frozen=True, slots=True)
class Backend:
    """A device, and how to make an engine for it in each thread.

    ``chunk_items``: how many weights it should be given at once. ``around``: what must hold while
    the threads run. ``note``: what a user should know of it.
    """

    name: str
    make: Callable[[], Engine]
    chunk_items: int
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    note: str = ""

    @property
    def is_cuda(self) -> bool:
        """Whether the arithmetic is done on a GPU."""
        return self.name.startswith("cuda")


def backend_for(device: str) -> Backend:
    """The backend for "auto", "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one.

    Raises:
        UsageError: there is no such device.
        EnvironmentFaultError: torch finds no such CUDA device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise UsageError(f"device {show(device)!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" or (kind == "auto" and _has_driver()):
        from . import with_torch

        count = with_torch.cuda_devices()
        if count > int(index or 0):
            return with_torch.backend(device if kind == "cuda" else "cuda")
        if kind == "cuda":
            raise EnvironmentFaultError(
                f"device {device}: torch finds {count} CUDA devices; use --device cpu"
            )
    try:
        from . import with_numba
    except (ImportError, OSError) as error:  # not there, not for this numpy, without its LLVM
        from . import with_torch

        why = f"numba cannot be used ({show(error)}); torch does the arithmetic, slower"
        if isinstance(error, ImportError) and error.name == "numba":
            why = "numba is not installed; with moe-ckpt[fast] a CPU converts several times faster"
        return with_torch.backend("cpu", why)
    return with_numba.backend()


def _has_driver() -> bool:
    """Whether CUDA's driver is installed: torch, which knows more, takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
