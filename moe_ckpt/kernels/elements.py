"""Single numbers in compiled loops: their bits, and the codes of small floats.

LLVM makes vector instructions of loops over these functions where integers stay 32 bits wide;
numba widens every sum of them, hence the many ``U32``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = ["F32", "U32", "as_bits", "as_float", "as_number", "compiled", "e2m1", "e4m3"]
__all__ += ["bf16", "flat", "inlined", "largest_of_16", "magnitude", "of_e4m3", "row_of"]

F32, U32 = np.float32, np.uint32
_I32, _FLOAT = ir.IntType(32), ir.FloatType()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, and keep the result beside the module or in the user's cache.

    What cannot be kept, or read again, is compiled anew each time: a cache stops no conversion.
    Divisions are IEEE's, and no product and sum become one operation: numba does neither unless
    asked to (``fastmath``).
    """
    try:
        made = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no folder to keep it in
        made = njit(nogil=True, error_model="numpy")(function)
    else:
        cache = made._cache
        cache.load_overload = _or_none(cache.load_overload)
        cache.save_overload = _or_none(cache.save_overload)
    typed: Callable[..., Any] = made
    return typed


def _or_none(use: Callable[..., Any]) -> Callable[..., Any]:
    """A use of the cache that may fail: its disk may be full, and its files torn."""

    def attempt(*args: Any) -> Any:
        try:
            return use(*args)
        except Exception:  # noqa: BLE001  what unpickling damaged bytes raises may be anything
            return None

    return attempt


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `compiled`, and copied into its callers: LLVM alone leaves some loops slower."""
    made: Callable[..., Any] = njit(inline="always", error_model="numpy")(function)
    return made


@intrinsic
def as_number(_typing: Any, stored: Any) -> Any:
    """The float32 of a stored weight: uint16 holds bf16, int16 holds fp16, uint32 holds fp32."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if signature.args[0] == types.uint16:
            bits = builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16))
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), _FLOAT)
        return builder.bitcast(bits, _FLOAT)

    return types.float32(stored), generate


@intrinsic
def as_float(_typing: Any, _bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(_typing: Any, _value: Any) -> Any:
    """The bits of a float32, uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


@intrinsic
def magnitude(_typing: Any, stored: Any) -> Any:
    """The bits of a stored weight without its sign, of the same type; they are ordered as it is."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], ir.Constant(arguments[0].type, _without_sign(stored)))

    return stored(stored), generate


def _without_sign(stored: Any) -> int:
    return (1 << (int(stored.bitwidth) - 1)) - 1


@intrinsic
def largest_of_16(_typing: Any, row: Any, _start: Any) -> Any:
    """The largest of 16 items of a row without their sign bits, as stored.

    LLVM makes one vector of a maximum over so few only if it is told to: 10 times faster.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        nbits = row.dtype.bitwidth
        item = ir.IntType(nbits)
        vector = ir.VectorType(item, 16)
        address = builder.gep(array.data, [arguments[1]])
        items = builder.load(builder.bitcast(address, vector.as_pointer()))
        items.align = nbits // 8
        items = builder.and_(items, ir.Constant(vector, [_without_sign(row.dtype)] * 16))
        name = f"llvm.vector.reduce.umax.v16i{nbits}"
        kind = ir.FunctionType(item, [vector])
        largest = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(largest, [items])

    return row.dtype(row, types.intp), generate


def flat(items: NDArray[Any]) -> tuple[NDArray[Any], int, int]:
    """All items from the first to the last of [B, N, K], and the strides of B and N in items."""
    B, N, K = items.shape
    if items.flags.c_contiguous:
        return items.reshape(-1), N * K, K
    of_matrix, of_row, _ = (stride // items.itemsize for stride in items.strides)
    span = (B - 1) * of_matrix + (N - 1) * of_row + K
    return as_strided(items, (span,), (items.itemsize,)), of_matrix, of_row


@compiled
def row_of(strided: Any, b: int, n: int, count: int) -> Any:
    """Items of row n of matrix b, where ``strided`` is a flat array and its strides in items."""
    flat, of_matrix, of_row = strided
    start = b * of_matrix + n * of_row
    return flat[start : start + count]


# x + 2**(e+s) rounds |x| to steps of 2**(e+s-23) in the adder, half to even, and the sum's last
# bits count the steps. With e the exponent of x, but not below the format's smallest normal one,
# and steps of a mantissa's last bit, the count and the steps of the exponents below are the code.


@inlined
def _code(bits: Any, largest: int, least: int, mantissa: int) -> Any:
    """The code, without sign, of a float32 by its bits.

    ``largest``: the bits of the largest value, which takes the place of what is beyond it.
    ``least``: the exponent, biased as in float32, of the smallest normal one. ``mantissa``: its
    bits.
    """
    size = min(U32(bits & U32(0x7FFFFFFF)), U32(largest))
    exponent = max(U32(size & U32(0x7F800000)), U32(least << 23))
    magic = U32(exponent + U32((23 - mantissa) << 23))
    steps = U32(as_bits(as_float(size) + as_float(magic)) - magic)
    return U32(U32(steps + U32(exponent >> U32(23 - mantissa))) - U32(least << mantissa))


@compiled
def e2m1(x: Any) -> Any:
    """The code of a float32, uint32: half to even, beyond 6 becomes 6, a negative 0 is 8."""
    bits = as_bits(x)
    return U32(_code(bits, 0x40C00000, 127, 1) | U32(U32(bits >> U32(28)) & U32(8)))


@compiled
def e4m3(x: Any) -> Any:
    """The code of a float32, uint32: half to even, beyond 448 becomes 448."""
    bits = as_bits(x)
    return U32(_code(bits, 0x43E00000, 121, 3) | U32(U32(bits >> U32(24)) & U32(0x80)))


@compiled
def of_e4m3(code: Any) -> Any:
    """The float32 of a code without sign, uint32."""
    if code < U32(8):
        return F32(code) * F32(2.0**-9)
    return as_float(U32(U32(code << U32(20)) + U32(120 << 23)))


@compiled
def bf16(x: Any) -> Any:
    """The bits of a finite float32 as a bf16, uint32: half to even."""
    bits = as_bits(x)
    return U32(U32(bits + U32(0x7FFF + U32(U32(bits >> U32(16)) & U32(1)))) >> U32(16))
