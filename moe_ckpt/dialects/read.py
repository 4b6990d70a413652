"""What each runtime makes of a configuration, whoever wrote it: the format of every module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import show
from .methods import METHODS
from .reading import Reading

__all__ = ["Reading", "read_config"]


def read_config(method: str, said: Mapping[str, Any]) -> Reading:
    """Read what one file says of quantization, where that is ``method``."""
    reading = Reading()
    known = METHODS.get(method)
    named = said.get("quant_method")
    if "quant_method" not in said:
        reading.problems.append("has no quant_method, by which runtimes know what it is")
    elif known is None or (known.names and named not in known.names):
        reading.problems.append(
            f"quant_method {show(named)!r} is unknown; known are {', '.join(METHODS)}"
        )
    if known is None:
        return reading
    _check_kv_cache(said, method, reading)
    known.read(said, reading)
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
