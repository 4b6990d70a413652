"""The kernels of `moe_ckpt.kernels` on a CPU, without torch.

A format without a kernel is done by torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats import QuantFormat, find_format
from ..kernels import dequantize, quantize, rows
from ..kernels.elements import flat
from ..source.items import numbers
from ..source.stored import Encoded
from .engine import Backend

if TYPE_CHECKING:
    from .with_torch import TorchEngine

__all__ = ["NumbaEngine", "backend"]

_CHUNK_ITEMS = 1 << 22
_BITS = {"float16": np.int16, "float32": np.uint32, "uint16": np.uint16}


def backend() -> Backend:
    """The CPU."""
    return Backend("cpu", NumbaEngine, _CHUNK_ITEMS)


class NumbaEngine:
    """Compiled loops over numpy arrays."""

    out_of_memory: type[Exception] = MemoryError

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def release(self) -> None:
        """Forget the buffers."""
        self._buffers.clear()

    def host(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        """A buffer; the one of this name before is overwritten."""
        found = self._buffers.get(name)
        if found is None or found.size < nbytes:
            found = self._buffers[name] = np.empty(nbytes, np.uint8)
        return found[:nbytes]

    def weights(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The stored floats themselves."""
        return stored

    def empty(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of float32; the one of this name before is overwritten."""
        return self._scratch(name, shape, np.dtype(np.float32))

    def decode(
        self,
        encoded: Encoded,
        parts: Mapping[str, NDArray[Any]],
        out: NDArray[np.float32],
        skip: int,
    ) -> None:
        """Put the weights that parts stand for, but ``skip`` rows, into ``out``."""
        row = find_format(encoded.format)
        kernel = dequantize.KERNELS.get(row.module)
        if kernel is None:
            engine = _torch()
            engine.decode(encoded, parts, engine.weights(out), skip)
            return
        code = next(part for part in encoded.parts if part.role == "qweight")
        assert row.scale is not None
        codes = parts["qweight"]
        if code.dtype == "I32":
            codes = codes.view(np.uint8)
        B, N, K = codes.shape
        values = self.empty("values", (B, N, 2 * K if code.columns > 1 else K))
        kernel(codes, _scales(encoded, parts), row.scale, values)
        np.copyto(out, values[:, skip:])

    def numbers(self, weights: NDArray[Any]) -> NDArray[np.float32]:
        """The values of weights."""
        return numbers(weights, _dtype(weights))

    def largest(self, weights: NDArray[Any], axis: int) -> NDArray[np.float32]:
        """Largest magnitudes along an axis."""
        B, N, K = weights.shape
        if axis == 2:
            found = np.empty((B, N), np.float32)
            rows.largest_of_rows(flat(_bits(weights)), found, (B, N, K))
            return found
        bits = _bits(weights)
        largest = np.zeros((B, K), bits.dtype)
        rows.largest_of_columns(flat(bits), largest, (B, N, K))
        return numbers(largest.view(weights.dtype), _dtype(weights))

    def quantize(
        self,
        target: QuantFormat,
        weight_BNK: NDArray[Any],
        scale: NDArray[np.float32] | None,
        out: Mapping[str, NDArray[Any]],
    ) -> None:
        """Put the parts with rows into ``out``."""
        kernel = quantize.KERNELS.get(target.module)
        if kernel is None:
            engine = _torch()
            engine.quantize(target, engine.weights(weight_BNK), scale, out)
            return
        results = {role: self._in_rows(role, items) for role, items in out.items()}
        kernel(_bits(self._in_order(weight_BNK)), scale, results)
        for role, items in out.items():
            if results[role] is not items:
                np.copyto(items, results[role])

    def _scratch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self.host(name, nbytes).view(dtype).reshape(shape)

    def _in_order(self, weight_BNK: NDArray[Any]) -> NDArray[Any]:
        """The weights with contiguous rows."""
        if weight_BNK.strides[2] == weight_BNK.itemsize:
            return weight_BNK
        ordered = self._scratch("rows", weight_BNK.shape, weight_BNK.dtype)
        rows.transpose(_bits(weight_BNK.swapaxes(1, 2)), _bits(ordered))
        return ordered

    def _in_rows(self, role: str, items: NDArray[Any]) -> NDArray[Any]:
        """The result's place, or another one if its rows are not contiguous."""
        if items.strides[2] == items.itemsize:
            return items
        return self._scratch(f"rows of {role}", items.shape, items.dtype)


def _torch() -> TorchEngine:
    """What does the formats that have no kernel."""
    from .with_torch import cpu_engine

    return cpu_engine()


def _bits(weights: NDArray[Any]) -> NDArray[Any]:
    return weights.view(_BITS[weights.dtype.name])


def _dtype(weights: NDArray[Any]) -> str:
    return "BF16" if weights.dtype == np.uint16 else "F32"


def _scales(encoded: Encoded, parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The float32 scales of codes, [B, rows, blocks]: all of one block multiplied together."""
    scale: NDArray[np.float32] | None = None
    for part in encoded.parts:
        if part.role in ("block_scale", "channel_scale"):
            scale = np.ascontiguousarray(numbers(parts[part.role], part.dtype))
    if "global_scale" in parts:
        factor = np.asarray(parts["global_scale"], np.float32)[:, None, None]
        scale = factor if scale is None else scale * factor
    if "global_divisor" in parts:
        divisor = np.asarray(parts["global_divisor"], np.float32)[:, None, None]
        scale = (np.float32(1) if scale is None else scale) / divisor
    if scale is None:
        raise AssertionError(f"{encoded.format} has no scales")
    return scale
