"""Largest magnitudes and number formats on CUDA, in Triton: the bytes of the torch codecs.

Each weight is read once and each result written once, in one launch for a batch of matrices.
The kernels are in `triton_kernels`, their arithmetic in `triton_rounding`. They take weights of
any strides, and are made for those whose columns or whose rows are contiguous. Importing this
needs Triton 3.6 or later; launching, a C compiler, with which Triton builds its launcher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from . import triton_kernels

__all__ = ["FORMATS", "quantize", "row_amax"]

# `tl.div_rn` of earlier ones is div.rn.ftz in PTX: a subnormal quotient becomes zero.
_FIRST_EXACT = (3, 6)
if tuple(map(int, triton.__version__.split(".")[:2])) < _FIRST_EXACT:
    raise ImportError(
        f"it is {triton.__version__}, which divides inexactly; install Triton 3.6 or later"
    )

_PAIRED = ("nvfp4", "mxfp4", "int4")
FORMATS = (*_PAIRED, "mxfp8", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel")

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BITS = {2: torch.int16, 4: torch.int32}
_PAIR_BITS = {2: torch.int32, 4: torch.int64}
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def _cdiv(size: int, step: int) -> int:
    return -(-size // step)


def _pow2(size: int, most: int) -> int:
    return min(most, 1 << max(size - 1, 0).bit_length())


def _tile(n: int, k: int, rows_first: bool, columns: int, size: int) -> tuple[int, int]:
    """Rows and columns of a tile: as many of one row as are contiguous, or enough of a column."""
    columns = _pow2(k, 64 if rows_first else columns)
    return _pow2(n, size // columns), columns


def _grid(batch: int, n: int, k: int, rows_first: bool) -> tuple[int, int, int]:
    return (n, k, batch) if rows_first else (k, n, batch)


def _pair_words(bits_BNK: torch.Tensor, itemsize: int) -> torch.Tensor | None:
    """A view of pairs of columns as one integer each, where memory has them so."""
    strides = (*bits_BNK.stride()[:2], bits_BNK.storage_offset())
    if bits_BNK.stride(2) != 1 or any(stride % 2 for stride in strides):
        return None
    return bits_BNK.view(_PAIR_BITS[itemsize])


def row_amax(weight_BNK: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, as `formats.amax.abs_max` finds it.

    Args:
        weight_BNK: bf16, fp16 or fp32, of any strides.

    Returns:
        float32 [B, N], not finite exactly if a value of the row was not.
    """
    B, N, K = weight_BNK.shape
    bits = weight_BNK.view(_BITS[weight_BNK.element_size()])
    rows_first = bits.stride(1) == 1 and bits.stride(2) != 1
    rows, columns = _tile(N, K, rows_first, 512, 8192)
    # Few rows: several programs for one, so that there is work for all of the device.
    programs = B * _cdiv(N, rows)
    parts = max(1, min(_cdiv(2048, max(programs, 1)), K // (8 * columns)))
    per_program = _cdiv(_cdiv(K, parts), columns) * columns or 1
    parts = _cdiv(K, per_program)
    make = torch.empty if parts == 1 else torch.zeros
    amax = make((B, N), dtype=torch.int32, device=weight_BNK.device)
    if programs and parts:
        with torch.cuda.device(weight_BNK.get_device()):
            triton_kernels.row_amax[_grid(B, _cdiv(N, rows), parts, rows_first)](
                bits,
                amax,
                N,
                K,
                *bits.stride(),
                per_program,
                DTYPE=_DTYPES[weight_BNK.dtype],
                ROWS=rows,
                COLUMNS=columns,
                ROWS_FIRST=rows_first,
                ALONE=parts == 1,
                **_OPTIONS,
            )
    return amax.view(torch.float32)


def quantize(
    format: str,
    weight_BNK: torch.Tensor,
    scale: torch.Tensor | None,
    out: Mapping[str, torch.Tensor],
) -> None:
    """Quantize B matrices.

    Args:
        format: one of `FORMATS`: the module of the codec. The group of int4 is that of ``out``.
        weight_BNK: bf16, fp16 or fp32, of any strides, finite, in the sizes that the format has.
        scale: float32, what weights are divided by: [B] for nvfp4 (the global scale) and
            fp8_tensor, [B, N] for fp8_channel and int8_channel, else None.
        out: where to put the result, by role: contiguous, on the same device.
    """
    B, N, K = weight_BNK.shape
    assert all(tensor.is_contiguous() for tensor in out.values())
    if not weight_BNK.numel():
        return
    bits = weight_BNK.view(_BITS[weight_BNK.element_size()])
    rows_first = bits.stride(1) == 1 and bits.stride(2) != 1
    qweight = out["qweight"].view(torch.uint8)
    if scale is not None:
        scale = scale.contiguous()
    if "channel_scale" in out and scale is not None:
        out["channel_scale"].copy_(scale.view(out["channel_scale"].shape))
    block_scale = out.get("block_scale")
    if block_scale is not None and block_scale.element_size() < 4:
        block_scale = block_scale.view({1: torch.uint8, 2: torch.int16}[block_scale.element_size()])
    options = {"FORMAT": format, "DTYPE": _DTYPES[weight_BNK.dtype], **_OPTIONS}
    with torch.cuda.device(weight_BNK.get_device()):
        if format in _PAIRED:
            assert block_scale is not None
            assert format != "int4" or out["block_scale"].dtype == torch.bfloat16
            words = None if rows_first else _pair_words(bits, weight_BNK.element_size())
            block = K // block_scale.shape[-1] // 2
            in_thread = rows_first and block <= 16  # a longer one has too many registers
            if in_thread:
                rows, columns = _pow2(N, 64), block * _pow2(K // 2 // block, 16)
                options["num_warps"] = 4  # so that two programs fit on a multiprocessor
            else:
                rows, columns = _tile(N, K // 2, rows_first, 128, 4096)
                columns = max(columns, block)
            grid = _grid(B, _cdiv(N, rows), _cdiv(K // 2, columns), rows_first)
            triton_kernels.pack_pairs[grid](
                bits if words is None else words,
                scale,
                qweight,
                block_scale,
                N,
                K // 2,
                *(bits if words is None else words).stride(),
                WORDS=words is not None,
                IN_THREAD=in_thread,
                BLOCK=block,
                ROWS=rows,
                COLUMNS=columns,
                ROWS_FIRST=rows_first,
                **options,
            )
        else:
            if format == "fp8_block":
                rows = columns = 128
                options["maxnreg"] = 128  # for the same
            else:
                rows, columns = _tile(N, K, rows_first, 256, 8192)
            grid = _grid(B, _cdiv(N, rows), _cdiv(K, columns), rows_first)
            triton_kernels.round_bytes[grid](
                bits,
                scale,
                qweight,
                block_scale,
                N,
                K,
                *bits.stride(),
                ROWS=rows,
                COLUMNS=columns,
                ROWS_FIRST=rows_first,
                **options,
            )
