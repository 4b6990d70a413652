"""DeepSeek's dialect, ``quant_method: fp8``: what most runtimes read of block scales.

The tensors are those of `table`.

The list of what is not quantized is called ``modules_to_not_convert``, the name that all runtimes
read; it has every module by its full name, for vLLM knows no patterns. It has the output head,
too: transformers quantizes it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import with_quantization
from ..dialect import Assignment, Dialect, refused, written
from ..matching import built_of, check
from .match import fp8_readers
from .table import BLOCKS, DEEPSEEK, KEPT, PLAIN, SPELLINGS

__all__ = ["DIALECT"]

_BLOCK = next(size for size, name in BLOCKS.items() if name == DEEPSEEK.format)


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json."""
    modules = built_of(assignment)
    entries = sorted({name for m in modules if m.format is None for name in m.linears})
    check(fp8_readers(entries, DEEPSEEK.format), modules, "list of modules_to_not_convert")
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [*_BLOCK],
        KEPT: entries,
    }
    return {"config.json": with_quantization(config, quantization)}


DIALECT = Dialect(
    name="fp8",
    summary="DeepSeek's files with 128x128 blocks, which every runtime reads",
    spellings=written([*SPELLINGS, PLAIN]),
    config_files=config_files,
    refused=refused(SPELLINGS),
)
