"""Who does the arithmetic: torch on any device, or numba on a CPU. The bytes are the same.

An engine is one thread's. It takes bytes from the host and gives bytes to the host; between, its
arrays are torch tensors or numpy arrays, of which callers use only shapes, slices and `swapaxes`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import EnvironmentFaultError, UsageError, show
from ..faults import cause_of, not_loaded
from .engine import Backend, Engine, host_items

__all__ = ["Backend", "Engine", "backend_for", "host_items"]


def backend_for(device: str) -> Backend:
    """The backend for "auto", "cpu", "cuda" or "cuda:N"; "auto" is CUDA where there is one.

    Raises:
        UsageError: there is no such device.
        EnvironmentFaultError: torch finds no such CUDA device, or cannot be loaded.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise UsageError(f"device {show(device)!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" or (kind == "auto" and _has_driver()):
        with _loading_torch():
            from . import with_torch

        count = with_torch.cuda_devices()
        if count > int(index or 0):
            return with_torch.backend(device if kind == "cuda" else "cuda")
        if kind == "cuda":
            raise EnvironmentFaultError(
                f"device {device}: torch finds {count} CUDA devices; use --device cpu"
            )
    missing: Exception
    try:
        from . import with_numba
    except (ImportError, OSError) as error:  # not there, not for this numpy, without its LLVM
        missing = error
    else:
        return with_numba.backend()
    unusable = f"numba cannot be used ({show(cause_of(missing))})"
    with _loading_torch(f"{unusable}, and "):
        from . import with_torch
    if isinstance(missing, ImportError) and missing.name == "numba":
        why = "numba is not installed; with moe-ckpt[fast] a CPU converts several times faster"
    else:
        why = f"{unusable}; torch does the arithmetic, slower"
    return with_torch.backend("cpu", why)


@contextmanager
def _loading_torch(before: str = "") -> Iterator[None]:
    """Say why torch cannot be loaded; ``before`` is what was tried before it."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise not_loaded("torch", error, before) from error


def _has_driver() -> bool:
    """Whether CUDA's driver is installed: torch, which knows more, takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
