"""What each runtime makes of a configuration, whoever wrote it: the format of every module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import show
from ..runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..source.declared import Declared
from .compressed_tensors.read import read_compressed
from .fp8.match import fp8_readers
from .matching import Built
from .modelopt.read import read_modelopt
from .reading import Reading, texts_of

__all__ = ["Reading", "read_config"]

_BLOCKS = {(128, 128): "fp8-block", (1, 32): "mxfp8"}
_KEPT, _IGNORED = "modules_to_not_convert", "ignored_layers"
_NAMES_OF_MODELOPT = ("modelopt", *(f"modelopt_{of}" for of in ("fp4", "fp8", "mixed", "mxfp8")))


def read_config(said: Declared) -> Reading:
    """Read what one file says of quantization."""
    reading = Reading()
    read = _METHODS.get(said.method)
    named = said.said.get("quant_method")
    if "quant_method" not in said.said:
        reading.problems.append("has no quant_method, by which runtimes know what it is")
    elif read is None or (said.method == "modelopt" and named not in _NAMES_OF_MODELOPT):
        reading.problems.append(
            f"quant_method {show(named)!r} is unknown; known are {', '.join(_METHODS)}"
        )
    if read is None:
        return reading
    _check_kv_cache(said.said, said.method, reading)
    read(said.said, reading)
    return reading


def _check_kv_cache(said: Mapping[str, Any], method: str, reading: Reading) -> None:
    """What is said of the KV cache: vLLM knows one kind of compressed-tensors."""
    algo, scheme = said.get("kv_cache_quant_algo"), said.get("kv_cache_scheme")
    if algo is not None and not isinstance(algo, str):
        reading.problems.append(f"kv_cache_quant_algo is {show(algo)}; expected a name or null")
    if scheme is None:
        return
    number = (scheme.get("num_bits"), scheme.get("type")) if isinstance(scheme, dict) else ()
    if not number or (method == "compressed-tensors" and number != (8, "float")):
        reading.problems.append(
            f"kv_cache_scheme is {show(scheme)}; expected numbers of 8 bits, type float, or null"
        )


def _fp8(said: Mapping[str, Any], reading: Reading) -> None:
    block = said.get("weight_block_size")
    found: str | None = "fp8-tensor"
    if block is not None:
        sizes = tuple(block) if isinstance(block, list) else ()
        found = _BLOCKS.get(sizes) if all(isinstance(n, int) for n in sizes) else None
    if found is None:
        reading.problems.append(
            f"weight_block_size is {show(block)}; runtimes know [128, 128] and MX's [1, 32]"
        )
        return
    if found == "fp8-tensor" and said.get("activation_scheme") == "static":
        reading.static.add(found)
    if said.get("activation_scheme") not in ("dynamic", "static"):
        reading.problems.append(
            f"activation_scheme is {show(said.get('activation_scheme'))}; expected dynamic"
        )
    _listed(said, found, reading)


def _listed(said: Mapping[str, Any], found: str, reading: Reading) -> None:
    """vLLM and SGLang look for ``ignored_layers`` first, the others only for the other key."""
    ignored = texts_of(said.get(_IGNORED), _IGNORED, reading)
    reading.has_list = False
    kept = texts_of(said.get(_KEPT), _KEPT, reading)
    reading.entries = (*ignored, *kept)
    reading.readers = fp8_readers(kept, found)
    if ignored:
        first = fp8_readers(ignored, found)
        reading.readers |= {VLLM: first[VLLM], SGLANG: first[SGLANG]}


def _mxfp8(said: Mapping[str, Any], reading: Reading) -> None:
    _listed(said, "mxfp8", reading)


def _fbgemm(said: Mapping[str, Any], reading: Reading) -> None:
    _listed(said, "fp8-channel", reading)


def _mxfp4(said: Mapping[str, Any], reading: Reading) -> None:
    """All runtimes quantize the experts, and read no list for them."""
    reading.entries = texts_of(said.get(_KEPT), _KEPT, reading)

    def read(module: Built) -> str | None:
        return "mxfp4" if module.is_experts else None

    names: Iterable[str] = (VLLM, SGLANG, TRTLLM, TRANSFORMERS)
    reading.readers = dict.fromkeys(names, read)


_METHODS: dict[str, Callable[[Mapping[str, Any], Reading], None]] = {
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
}
