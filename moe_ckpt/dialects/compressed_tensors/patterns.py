"""What ``ignore`` and ``targets`` of compressed-tensors hold, written for every runtime.

Names are what vLLM and SGLang translate when their own module names differ; expressions hold
under any prefix. Both are written into ``ignore``. An expression is as wide as it can be without
meaning a module that is treated otherwise: any layer, then this layer, then this module.

Expressions have the names of fused modules, too: SGLang knows their members only of models that
say which they are. They end in ``$``, for runtimes look at the start of a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from ..matching import Built
from .match import LINEAR, fits

__all__ = ["ignore_list", "targets_of"]

_ANY_PREFIX = r"re:(.*\.)?"


def ignore_list(modules: Sequence[Built], set_aside: Iterable[str]) -> list[str]:
    """Names and expressions of what is not quantized, and of the parts set aside."""
    misses = _missing(name for module in modules if module.format for name in module.names)
    entries: set[str] = set()
    for module in modules:
        if module.format:
            continue
        entries.update(module.linears)
        tails = [module.name] if module.is_experts else module.names
        for name in tails:
            end = r"\..*" if module.is_experts else "$"
            entries.update(_widest(name, end, misses))
    for part in set_aside:
        entries.update(_widest(part, r"\..*", misses))
    return sorted(entries)


def targets_of(modules: Sequence[Built]) -> dict[str, list[str]]:
    """Format -> its targets: the class if there is one format, else expressions.

    transformers takes the first group with an expression that has ``experts`` in it for that of
    the experts, so those of shared experts are spelled otherwise.
    """
    quantized = [module for module in modules if module.format]
    formats = dict.fromkeys(module.format for module in quantized if module.format)
    if len(formats) == 1:
        return {name: [LINEAR] for name in formats}
    targets: dict[str, set[str]] = {name: set() for name in formats}
    for name, found in targets.items():
        misses = _missing(n for module in quantized if module.format != name for n in module.names)
        found.update(t for m in quantized if m.format == name for t in _targets(m, misses))
    return {name: sorted(found) for name, found in targets.items()}


def _targets(module: Built, misses: Callable[[str], bool]) -> list[str]:
    if module.is_experts:
        end = r"\.\d+\.\w+$"
        anywhere = rf"{_ANY_PREFIX}experts{end}"
        return [anywhere] if misses(anywhere) else _widest(module.name, end, misses)
    parent = module.name.rpartition(".")[0]
    leaves = sorted({name.rpartition(".")[2] for name in module.names})
    leaf = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
    end = rf"\.{leaf}$" if parent else "$"
    found = _widest(parent or module.name, end, misses)
    return [pattern.replace("shared_experts", "shared_expert[s]") for pattern in found]


def _missing(others: Iterable[str]) -> Callable[[str], bool]:
    """Whether an expression means none of these names."""
    names = list(others)

    @cache
    def misses(pattern: str) -> bool:
        return not any(fits(pattern, name) for name in names)

    return misses


def _widest(name: str, end: str, misses: Callable[[str], bool]) -> list[str]:
    r"""The widest expression for a name and what follows it that misses others, if one does.

    >>> _widest("model.layers.3.mlp.gate", "$", _missing(["mtp.layers.0.mlp.gate"]))
    ['re:(.*\\.)?layers\\.3\\.mlp\\.gate$']
    """
    parts = name.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdigit()), len(parts))
    tail = parts[max(first - 1, 0) :]
    layer = r"\.".join(re.escape(part) for part in tail)
    any_layer = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in tail)
    if tail[-1].isdigit():  # a whole layer: no other layer is meant
        any_layer = layer
    candidates = (
        f"{_ANY_PREFIX}{any_layer}{end}",
        f"{_ANY_PREFIX}{layer}{end}",
        f"re:{re.escape(name)}{end}",
    )
    return next(([pattern] for pattern in candidates if misses(pattern)), [])
