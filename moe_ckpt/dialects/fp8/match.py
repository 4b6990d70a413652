"""How each runtime reads ``modules_to_not_convert`` of ``quant_method: fp8``.

vLLM          the name as it is; all members of a fused module. Names with ``experts`` in
              them are looked for inside the entries that have it too: experts of a layer, and
              linear layers of shared experts (quant_utils.py, is_layer_skipped)
SGLang        whole components, anywhere in the name; every entry counts with and without
              ``model.``; fused modules by their members; names with ``experts`` as in vLLM
              (fp8.py, Fp8Config.from_config; utils.py, is_layer_skipped)
transformers  a regular expression that ends where a component does, from the start of the
              name; or plain text at the end of the name (quantizers_utils.py,
              should_convert_module). Before 5.23 it could end anywhere.
TensorRT-LLM  fnmatch, case sensitive, against the name and its parents
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ...runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..matching import Built, Reader, UndecidedError, all_or_none
from ..modelopt.match import trtllm

__all__ = ["fp8_readers"]

Rule = Callable[[Built], bool]


def fp8_readers(entries: Sequence[str], format_name: str) -> dict[str, Reader]:
    """How each runtime reads a list, where everything else has one format."""
    by_trtllm = trtllm(entries)
    rules: dict[str, Rule] = {
        VLLM: _vllm(entries),
        SGLANG: _sglang(entries),
        TRANSFORMERS: _transformers(entries),
        TRTLLM: lambda module: by_trtllm(module.name, module.linears),
    }
    return {runtime: _reader(rule, format_name) for runtime, rule in rules.items()}


def _reader(excluded: Rule, format_name: str) -> Reader:
    # No runtime but transformers quantizes the output head, listed or not.
    return lambda module: None if excluded(module) else format_name


def _vllm(entries: Iterable[str]) -> Rule:
    """vLLM's rule for a list."""
    listed = frozenset(entries)
    of_experts = [entry for entry in listed if "experts" in entry]

    def excluded(module: Built) -> bool:
        if len(module.members) > 1 and not module.is_experts:
            return all_or_none(module.members, listed.__contains__)
        if "experts" in module.name:
            return any(module.name in entry for entry in of_experts)
        return module.name in listed

    return excluded


def _sglang(entries: Iterable[str]) -> Rule:
    """SGLang's rule for a list."""
    bare = [entry.removeprefix("model.") for entry in entries]
    listed = frozenset([*bare, *(f"model.{entry}" for entry in bare)])
    of_experts = [entry for entry in listed if "experts" in entry]

    def skipped(name: str) -> bool:
        parts = name.split(".")
        return any(
            ".".join(parts[start:stop]) in listed
            for start in range(len(parts))
            for stop in range(start + 1, len(parts) + 1)
        )

    def excluded(module: Built) -> bool:
        if len(module.members) > 1 and not module.is_experts:
            return all_or_none(module.members, skipped)
        inside = "experts" in module.name and any(module.name in entry for entry in of_experts)
        return skipped(module.name) or inside

    return excluded


def _transformers(entries: Sequence[str]) -> Rule:
    """transformers' rule for a list; it builds no fused modules."""
    ends = tuple(entries)
    alternatives = "|".join(f"(?:{entry})" for entry in entries)
    try:
        pattern = re.compile(rf"(?:{alternatives})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        pattern = None  # a name with brackets, say: it raises as well

    def skipped(name: str) -> bool:
        if pattern is None:
            raise UndecidedError(name)
        return name.endswith(ends) or bool(entries and pattern.match(name))

    def excluded(module: Built) -> bool:
        return all_or_none(module.linears, skipped)

    return excluded
