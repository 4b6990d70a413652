"""Reused memory for temporaries.

Fresh memory costs a page fault for every 4 KiB, several times what the arithmetic on it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

__all__ = ["Scratch", "placed"]


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


def placed(
    out: Mapping[str, torch.Tensor] | None, role: str, values: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The part of a role: rounded into its place if ``out`` has one, else a tensor of a dtype."""
    return out[role].copy_(values) if out else values.to(dtype)
