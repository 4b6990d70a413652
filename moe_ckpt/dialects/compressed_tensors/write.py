"""The dialect of llm-compressor and the compressed-tensors library.

`table` has its tensors and schemes.

One group of modules for each format. Of a single format the target is the class ``Linear``, which
all runtimes read; of several, expressions: SGLang would look at the class before the members of
fused modules, and TensorRT-LLM refuses classes then.

The format at the top is ``mixed-precision`` for several, as the library has it, and what counts
is that of the group. Experts in 4-bit integers are the exception: SGLang refuses them unless
``pack-quantized`` is at the top (compressed_tensors_wNa16_moe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formats import UNQUANTIZED
from ..config import with_quantization
from ..dialect import Assignment, Dialect, written
from ..matching import built_of, check
from .match import compressed_readers
from .patterns import ignore_list, targets_of
from .table import KV_CACHE, PACKED, PLAIN, SPELLINGS, scheme_of

__all__ = ["DIALECT"]


def config_files(config: Mapping[str, Any], assignment: Assignment) -> dict[str, str]:
    """The text of config.json."""
    modules = built_of(assignment)
    groups = targets_of(modules)
    ignore = ignore_list(modules, assignment.set_aside)
    targets = {target: name for name, found in groups.items() for target in found}
    check(compressed_readers(ignore, targets), modules, "list of names and expressions")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": _format_of_all(groups, assignment),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": KV_CACHE if assignment.kv_cache else None,
        "ignore": ignore,
        "config_groups": {
            f"group_{number}": _group(name, found)
            for number, (name, found) in enumerate(groups.items())
        },
    }
    return {"config.json": with_quantization(config, quantization)}


def _format_of_all(groups: Mapping[str, list[str]], assignment: Assignment) -> str:
    formats = {scheme_of(name).stored for name in groups}
    if len(formats) == 1:
        return formats.pop()
    experts = [scheme_of(name) for name in assignment.experts if name != UNQUANTIZED]
    return PACKED if any(scheme.stored == PACKED for scheme in experts) else "mixed-precision"


def _group(format_name: str, targets: list[str]) -> dict[str, Any]:
    scheme = scheme_of(format_name)
    return {
        "targets": targets,
        "format": scheme.stored,
        "output_activations": None,
        "weights": scheme.weights,
        "input_activations": scheme.inputs,
    }


DIALECT = Dialect(
    name="compressed-tensors",
    summary="llm-compressor's files, which have every format",
    spellings=written([*SPELLINGS, PLAIN]),
    config_files=config_files,
    scalar_shape=(1,),
    mixes=True,
    kv_scales=("k_scale", "v_scale"),
)
