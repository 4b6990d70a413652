"""Reused memory for temporaries.

Fresh memory costs a page fault for every 4 KiB, several times what the arithmetic on it does.
"""

from __future__ import annotations

from math import prod

import torch

__all__ = ["Scratch"]


class Scratch:
    """Buffers by name, each as large as the largest tensor asked of it; for one thread."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; the one that had this name before is overwritten."""
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)
