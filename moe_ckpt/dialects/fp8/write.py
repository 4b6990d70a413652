"""DeepSeek's dialect, ``quant_method: fp8``: what most runtimes read of block scales.

The tensors are those of `table`.

The list of what is not quantized is called ``modules_to_not_convert``, the name that all runtimes
read; it has every module by its full name, for vLLM knows no patterns. It has the output head,
too: transformers quantizes it otherwise.

``scale_fmt: ue8m0`` says that all scales are powers of two, those of activations as well: vLLM and
SGLang compute so, and would round other scales; transformers holds them as E8M0. It stays where
all weights are those of a source that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import CONFIG, said_of, with_quantization
from ..dialect import FP8, Assignment, Dialect, refused, written
from ..matching import built_of, check
from .match import fp8_readers
from .table import BLOCKS, CARRIED, DEEPSEEK, KEPT, PLAIN, SPELLINGS

__all__ = ["DIALECT"]

_BLOCK = next(size for size, name in BLOCKS.items() if name == DEEPSEEK.format)


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json."""
    modules = built_of(assignment)
    entries = sorted({name for m in modules if m.format is None for name in m.linears})
    check(fp8_readers(entries, DEEPSEEK.format), modules, "list of modules_to_not_convert")
    quantization = {
        "quant_method": FP8,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [*_BLOCK],
        KEPT: entries,
    }
    if DEEPSEEK.format in assignment.moved:
        words = {key: said_of(config, key) for key in CARRIED}
        quantization |= {key: value for key, value in words.items() if value is not None}
    return {CONFIG: with_quantization(config, quantization, expert_dtype="fp8")}


DIALECT = Dialect(
    name=FP8,
    summary="DeepSeek's files with 128x128 blocks, which every runtime reads",
    spellings=written([*SPELLINGS, PLAIN]),
    config_files=config_files,
    refused=refused(SPELLINGS),
)
