"""The configuration files, and the source's config.json without what it says of quantization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["CONFIG", "EXPERT_DTYPE", "HF_QUANT_CONFIG", "as_text", "with_quantization"]
__all__ += ["said_of", "without_quantization"]

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's, which TensorRT-LLM reads

# DeepSeek-V4 says of its experts outside what it says of all else.
EXPERT_DTYPE = "expert_dtype"

_KEYS = frozenset({"quantization_config", "compression_config", EXPERT_DTYPE})


def with_quantization(
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    expert_dtype: str | None = None,
) -> str:
    r"""The text of config.json: the source's keys in their order, and the new quantization.

    The old one goes from every level: multi-modal models may have it in ``text_config``.
    ``expert_dtype``: what to say of experts, where the source says something of them.

    >>> with_quantization({"text_config": {"quantization_config": {}, "a": 1}}, None)
    '{\n  "text_config": {\n    "a": 1\n  }\n}\n'
    """
    kept = without_quantization(config)
    if expert_dtype and EXPERT_DTYPE in config:
        kept |= {EXPERT_DTYPE: expert_dtype}
    return as_text(kept if quantization is None else kept | {"quantization_config": quantization})


def said_of(config: Mapping[str, Any], key: str) -> Any:
    """What a config says of quantization under a key, at the first level that does; else None.

    >>> said_of({"text_config": {"quantization_config": {"scale_fmt": "ue8m0"}}}, "scale_fmt")
    'ue8m0'
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            found = value.get(key) if name in _KEYS else said_of(value, key)
            if found is not None:
                return found
    return None


def without_quantization(value: Any) -> Any:
    """A value of a config without what it says of quantization, at any level."""
    if isinstance(value, Mapping):
        return {key: without_quantization(item) for key, item in value.items() if key not in _KEYS}
    return [without_quantization(item) for item in value] if isinstance(value, list) else value


def as_text(value: Any) -> str:
    """JSON as all files are written."""
    return json.dumps(value, indent=2) + "\n"
