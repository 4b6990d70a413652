"""How each runtime decides from ModelOpt's exclude list that a module is not quantized.

Each runtime asks about the modules it builds: q/k/v and gate/up are one module there, and the
experts of a layer are one. The rules differ, so a list is right only if all of them agree:

    vLLM          exact, all members of a fused module; an entry that names the layer's experts;
                  any entry as plain text inside the name; fnmatch. ``x*`` counts as ``x``
                  and ``x.*`` (modelopt.py, is_layer_excluded)
    SGLang        ``*`` as ``.*``, matched in full against the name or one component of it; or
                  a name and everything under it; fused modules by their members; and for
                  MLA's projections, the last component of any entry, in any layer
                  (modelopt_quant.py, is_layer_excluded)
    TensorRT-LLM  fnmatch, case sensitive, against the name and its parents

A mix of formats has a table besides: the algorithm of each module. What is on neither list is
not quantized.

    vLLM          the name, the members of a fused module, any name below it; for experts any
                  name below their parent, so that shared experts speak for routed ones
                  (modelopt.py, ModelOptMixedPrecisionConfig._resolve_quant_algo)
    SGLang        the name, any name below it; the members of a fused module only where the
                  model says which these are (modelopt_quant.py, the same method)
    TensorRT-LLM  the first key that holds the name of the experts, or that of the first member
                  of a fused module; else the name (modeling_utils.py,
                  apply_layerwise_quant_config)

transformers has no quantizer for ModelOpt's files and reads no such list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ...runtimes import SGLANG, TRTLLM, VLLM
from ..matching import Built, Reader, Rule, UndecidedError, all_or_none

__all__ = ["RULES", "mixed_readers", "sglang", "trtllm", "vllm"]

_MLA_PROJECTIONS = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})


def vllm(entries: Iterable[str]) -> Rule:
    """vLLM's rule for a list; it raises `UndecidedError` where vLLM refuses to load."""
    expanded: list[str] = []
    for entry in entries:
        expanded += [entry[:-1], f"{entry[:-1]}.*"] if entry.endswith("*") else [entry]
    listed = frozenset(expanded)
    globs = _matcher(expanded)
    of_experts = [entry for entry in expanded if "experts" in entry]

    def excluded(module: str, members: tuple[str, ...]) -> bool:
        if all_or_none(members, listed.__contains__):
            return True
        if module.endswith(".experts") and any(module in entry for entry in of_experts):
            return True
        return globs(module) or any(entry in module for entry in expanded)

    return excluded


def sglang(entries: Iterable[str]) -> Rule:
    """SGLang's rule for a list; it raises `UndecidedError` where SGLang refuses to load."""
    listed = frozenset(entries)
    globs = _matcher(listed)
    tails = {entry.rpartition(".")[2] for entry in listed} & _MLA_PROJECTIONS

    def below(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:n]) in listed for n in range(1, len(parts) + 1))

    def excluded(module: str, members: tuple[str, ...]) -> bool:
        parts = module.split(".")
        if any(globs(candidate) for candidate in (module, *parts)):
            return True
        if any(tail in parts[-1] for tail in tails):
            return True
        return below(module) or all_or_none(members, below)

    return excluded


def trtllm(entries: Iterable[str]) -> Rule:
    """TensorRT-LLM's rule for a list; a fused module counts by its first member."""
    globs = _matcher(entries)

    def excluded(_module: str, members: tuple[str, ...]) -> bool:
        parts = members[0].split(".")
        return any(globs(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    return excluded


RULES: dict[str, Callable[[Iterable[str]], Rule]] = {
    VLLM: vllm,
    SGLANG: sglang,
    TRTLLM: trtllm,
}


def _matcher(entries: Iterable[str]) -> Callable[[str], bool]:
    """Whether a whole name equals an entry, or fits one with ``*`` for any text."""
    listed = frozenset(entries)
    patterns = [".*".join(map(re.escape, e.split("*"))) for e in sorted(listed) if "*" in e]
    pattern = re.compile("|".join(patterns)) if patterns else None

    def matches(name: str) -> bool:
        return name in listed or bool(pattern and pattern.fullmatch(name))

    return matches


def mixed_readers(entries: Iterable[str], layers: Mapping[str, str]) -> dict[str, Reader]:
    """How each runtime reads a mix: the exclude list, and module -> format."""
    listed = list(entries)
    lookups = {VLLM: _vllm_lookup, SGLANG: _sglang_lookup, TRTLLM: _trtllm_lookup}
    return {name: _reader(RULES[name](listed), lookups[name], layers) for name in lookups}


def _reader(
    excluded: Rule,
    lookup: Callable[[Built, Mapping[str, str]], str | None],
    layers: Mapping[str, str],
) -> Reader:
    def read(module: Built) -> str | None:
        return None if excluded(module.name, module.linears) else lookup(module, layers)

    return read


def _vllm_lookup(module: Built, layers: Mapping[str, str]) -> str | None:
    if module.name in layers:
        return layers[module.name]
    found = {layers[member] for member in module.linears if member in layers}
    if len(found) > 1:
        raise UndecidedError(module.name)
    if found:
        return found.pop()
    parents = [f"{module.name}."]
    if module.name.endswith(".experts"):
        parents.append(module.name.removesuffix("experts"))
    return _first(layers, lambda key: any(key.startswith(parent) for parent in parents))


def _sglang_lookup(module: Built, layers: Mapping[str, str]) -> str | None:
    if module.name in layers:
        return layers[module.name]
    return _first(layers, lambda key: key.startswith(f"{module.name}."))


def _trtllm_lookup(module: Built, layers: Mapping[str, str]) -> str | None:
    if module.is_experts:
        return _first(layers, lambda key: module.name in key)
    if len(module.members) > 1:
        return _first(layers, lambda key: module.members[0] in key)
    return layers.get(module.name)


def _first(layers: Mapping[str, str], fits: Callable[[str], bool]) -> str | None:
    return next((found for key, found in layers.items() if fits(key)), None)
