"""The number formats, one row each; `QuantFormat` says what the fields mean."""

from __future__ import annotations

from ..errors import UsageError
from . import e4m3
from .format import UNQUANTIZED, WHOLE_ROW, Codes, Part, QuantFormat

__all__ = ["DEFAULT_FORMAT", "FORMATS", "find_format", "without_input_scale"]

DEFAULT_FORMAT = "nvfp4"

_E2M1 = Codes(0x22, 6.0, 1, 0, 10.0)
_E4M3 = Codes(0x38, e4m3.MAX, 3, -6, 20.0)
# Integers have the same step at all magnitudes, so that one large weight can drown the others.
_INT4 = Codes(0x99, 7.0, 0, 0, 4.0, is_integer=True)
_INT8 = Codes(0x01, 127.0, 0, 0, 10.0, is_integer=True)

_NVFP4_PARTS = (
    Part("qweight", "U8", 2),
    Part("block_scale", "F8_E4M3", 16),
    Part("global_scale", "F32", 0),
)
_NVFP4_LARGEST = _E2M1.largest * _E4M3.largest
_INPUT_SCALE = Part("input_scale", "F32", 0)
_LIMIT = 2.0**127


def _int4(group: int) -> QuantFormat:
    return QuantFormat(
        name=f"int4-g{group}",
        module="int4",
        group=group,
        summary=f"4-bit integers, a scale per {group} weights",
        activations="16-bit",
        weight_bits=4,
        k_multiple=group,
        parts=(Part("qweight", "I32", 8), Part("block_scale", "BF16", group)),
        codes=_INT4,
        keeps_dtype_of="block_scale",
        limit=_LIMIT,
    )


FORMATS: tuple[QuantFormat, ...] = (
    QuantFormat(
        name="nvfp4",
        module="nvfp4",
        summary="4-bit floats, a scale per 16 weights",
        activations="4-bit, static scale",
        weight_bits=4,
        k_multiple=16,
        parts=(*_NVFP4_PARTS, _INPUT_SCALE),
        codes=_E2M1,
        exact_from=(("mxfp4", "nvfp4_from_mxfp4"),),
        input_scale=True,
        constant_input_scale=True,
        shares_dense_amax=True,
        largest=_NVFP4_LARGEST,
    ),
    QuantFormat(
        name="nvfp4-w4a16",
        module="nvfp4",
        summary="4-bit floats, a scale per 16 weights",
        activations="16-bit",
        weight_bits=4,
        k_multiple=16,
        parts=_NVFP4_PARTS,
        codes=_E2M1,
        same_weights_as="nvfp4",
        exact_from=(("mxfp4", "nvfp4_from_mxfp4"),),
        shares_dense_amax=True,
        largest=_NVFP4_LARGEST,
    ),
    QuantFormat(
        name="mxfp4",
        module="mxfp4",
        summary="4-bit floats, a power of two per 32 weights",
        activations="4-bit, dynamic",
        weight_bits=4,
        k_multiple=32,
        parts=(Part("qweight", "U8", 2), Part("block_scale", "U8", 32)),
        codes=_E2M1,
        limit=_LIMIT,
    ),
    _int4(128),
    _int4(64),
    _int4(32),
    QuantFormat(
        name="fp8-block",
        module="fp8_block",
        summary="8-bit floats, a scale per 128x128 weights",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=128,
        n_multiple=128,
        parts=(Part("qweight", "F8_E4M3", 1), Part("block_scale", "F32", 128, 128)),
        codes=_E4M3,
    ),
    QuantFormat(
        name="fp8-channel",
        module="fp8_channel",
        summary="8-bit floats, a scale per output row",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "F8_E4M3", 1), Part("channel_scale", "F32", WHOLE_ROW)),
        codes=_E4M3,
        largest=e4m3.MAX,
        amax_of_rows=True,
    ),
    QuantFormat(
        name="fp8-tensor",
        module="fp8_tensor",
        summary="8-bit floats, a scale per matrix",
        activations="8-bit, static scale",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "F8_E4M3", 1), Part("global_scale", "F32", 0), _INPUT_SCALE),
        codes=_E4M3,
        input_scale=True,
        largest=e4m3.MAX,
    ),
    QuantFormat(
        name="mxfp8",
        module="mxfp8",
        summary="8-bit floats, a power of two per 32 weights",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=32,
        parts=(Part("qweight", "F8_E4M3", 1), Part("block_scale", "U8", 32)),
        codes=_E4M3,
        limit=_LIMIT,
    ),
    QuantFormat(
        name="int8-channel",
        module="int8_channel",
        summary="8-bit integers, a scale per output row",
        activations="8-bit, dynamic",
        weight_bits=8,
        k_multiple=1,
        parts=(Part("qweight", "I8", 1), Part("channel_scale", "F32", WHOLE_ROW)),
        codes=_INT8,
        largest=127.5,
        amax_of_rows=True,
        limit=_LIMIT,
    ),
    QuantFormat(
        name=UNQUANTIZED,
        module="bf16",
        summary="not quantized: experts one by one, quantized sources decoded",
        activations="16-bit",
        weight_bits=16,
        k_multiple=1,
        parts=(Part("qweight", "BF16", 1),),
        keeps_dtype_of="qweight",
    ),
)


def find_format(name: str) -> QuantFormat:
    """The row of a format; `UsageError` lists the known ones."""
    for row in FORMATS:
        if row.name == name:
            return row
    raise UsageError(f"format {name!r} is unknown; choose {', '.join(f.name for f in FORMATS)}")


def without_input_scale(name: str) -> str:
    """The format of the same weights whose matrices carry no activation scale, or the same one."""
    row = find_format(name)
    same = (f.name for f in FORMATS if f.weights == row.weights and not f.input_scale)
    return next(same, name) if row.input_scale else name
