"""Codes of weights that are 0: under scales of 0, and in matrices that hold nothing else."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formats import WHOLE_ROW, Part
from ...source.headers import TensorInfo
from ...source.items import DTYPES, numbers
from ...source.stored import Read
from ...work.reader import SourceReader
from ..inventory import Module
from .windows import Bad

__all__ = ["lost_blocks", "nonzero_codes"]

_CHUNK_NBYTES = 1 << 22
_FIRST_NBYTES = 1 << 16  # nearly every matrix has another code there
# The bits of a code that are not its sign; integers of 4 bits are stored with 8 added.
_MAGNITUDE = {"U8": 0x77, "F8_E4M3": 0x7F}
_PACKED_ZEROS = 0x88


def nonzero_codes(reader: SourceReader, module: Module, most: int) -> int:
    """How many weights of a matrix are not 0; ``most`` + 1 if they are more."""
    part, info = module.parts[0]
    found = 0
    start, step = 0, _FIRST_NBYTES
    while start < info.nbytes:
        raw = _read(reader, info, start, min(step, info.nbytes - start))
        start, step = start + step, _CHUNK_NBYTES
        codes = _magnitudes(raw, part.dtype)
        if part.columns > 1:  # two in a byte
            found += int(np.count_nonzero(codes & 0x0F) + np.count_nonzero(codes & 0xF0))
        else:
            found += int(np.count_nonzero(codes))
        if found > most:
            return most + 1
    return found


def lost_blocks(reader: SourceReader, module: Module, whole: Bad) -> Bad | None:
    """The scales of 0 whose codes are not all 0, so that weights are lost; None if there are none.

    ``whole``: all that are 0, which are taken for lost where it is not known what they scale.

    Both tensors are read in pieces, and of the codes only those pieces that have such a scale.
    """
    codes_part, codes = module.parts[0]
    scale = whole.tensor
    part = next(part for part, info in module.parts if info.name == scale.name)
    grid = _grid(codes_part, codes, part, scale)
    if grid is None:
        return whole
    row_nbytes = codes.nbytes // grid.codes[0]
    step = max(1, _CHUNK_NBYTES // (grid.rows * row_nbytes))
    width = grid.columns * row_nbytes // grid.codes[1]
    lost: list[NDArray[np.intp]] = []
    for start in range(0, grid.scales[0], step):
        stop = min(start + step, grid.scales[0])
        is_zero = numbers(_items(reader, scale, grid.scales, start, stop), scale.dtype) == 0
        if not is_zero.any():
            continue
        first, last = start * grid.rows, min(stop * grid.rows, grid.codes[0])
        raw = _read(reader, codes, first * row_nbytes, (last - first) * row_nbytes)
        found = _magnitudes(raw, codes.dtype).reshape(last - first, row_nbytes) != 0
        found = np.logical_or.reduceat(found, np.arange(0, row_nbytes, width), axis=1)
        found = np.logical_or.reduceat(found, np.arange(0, last - first, grid.rows), axis=0)
        lost.append(np.flatnonzero(is_zero & found) + start * grid.scales[1])
    at = np.concatenate(lost) if lost else np.empty(0, np.intp)
    if not len(at):
        return None
    position = np.unravel_index(int(at[0]), scale.shape)
    return Bad(scale, len(at), 0.0, tuple(map(int, position)))


class _Grid(NamedTuple):
    """Codes and scales as rows and columns, and the codes in each that a scale stands for."""

    codes: tuple[int, int]
    scales: tuple[int, int]
    rows: int
    columns: int


def _grid(codes_part: Part, codes: TensorInfo, part: Part, scale: TensorInfo) -> _Grid | None:
    """None if scales do not lie beside the codes as in any encoding."""
    *lead, N, K = codes.shape
    if lead and len(scale.shape) == 3 and scale.shape[2] == K and N % scale.shape[1] == 0:
        rows, columns = N // scale.shape[1], 1  # a stack [E, K, N]: scales go down its columns
    else:
        rows = part.rows
        columns = K if part.columns == WHOLE_ROW else part.columns // codes_part.columns
        if lead and N % rows:
            return None
    R = prod(lead) * N
    found = _Grid((R, K), (-(-R // rows), -(-K // columns)), rows, columns)
    return found if prod(found.scales) == prod(scale.shape) else None


def _items(
    reader: SourceReader, info: TensorInfo, shape: tuple[int, int], start: int, stop: int
) -> NDArray[Any]:
    """Rows of a tensor that is taken to have a shape."""
    nbytes = info.nbytes // shape[0]
    raw = _read(reader, info, start * nbytes, (stop - start) * nbytes)
    return raw.view(DTYPES[info.dtype]).reshape(stop - start, shape[1])


def _read(reader: SourceReader, info: TensorInfo, start: int, nbytes: int) -> NDArray[np.uint8]:
    raw = np.empty(nbytes, np.uint8)
    reader.read(Read(info.shard, info.offset, info.nbytes), start, raw.data)
    return raw


def _magnitudes(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.uint8]:
    """Bytes that are 0 where codes stand for 0."""
    found: NDArray[np.uint8]
    if dtype == "I32":
        found = raw ^ np.uint8(_PACKED_ZEROS)
    else:
        found = raw & np.uint8(_MAGNITUDE.get(dtype, 0xFF))
    return found
