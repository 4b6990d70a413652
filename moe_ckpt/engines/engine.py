"""What does the arithmetic of one thread, and how each thread gets one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..formats import QuantFormat
from ..source.items import DTYPES
from ..source.stored import Encoded

__all__ = ["Backend", "Engine", "host_items"]

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
