"""The list of modules that are not quantized, written so that every runtime reads it alike.

Full names are what runtimes translate when their own module names differ; patterns with a
leading star hold under any prefix. Both are written. Never listed are a single expert (vLLM
would leave its whole layer unquantized) and ``model.layers.1`` without a dot behind it (layers
10 to 19 would match too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import LayoutError, show
from ..matching import UndecidedError, built_modules
from .match import RULES

__all__ = ["exclude_list"]

# Patterns that hold in every runtime; each is used only where it hits nothing quantized.
_PATTERNS = (
    # Without a dot before it: vLLM translates `.self_attn.` to `.` in names of Jamba, patterns too.
    "*self_attn*",
    "*.linear_attn*",
    "*.mlp.gate",
    "*.block_sparse_moe.gate",
    "*.mlp.shared_expert_gate",
    "*.mlp.shared_expert*",
    "*.router*",
    "*experts_gate*",
    "*lm_head",
)
_ALWAYS = ("lm_head",)  # also when tied to the embeddings: vLLM builds one either way


def exclude_list(
    quantized: Sequence[str], kept: Sequence[str], set_aside: Mapping[str, Sequence[str]]
) -> list[str]:
    """Names and patterns of what is not quantized.

    Args:
        quantized: quantized linear layers, and the experts of each layer as one module.
        kept: linear layers and experts of layers that stay as they are.
        set_aside: part of the model that stays whole -> linear layers and experts in it.

    Raises:
        LayoutError: names for which no list is read alike by every runtime.
    """
    built = built_modules(quantized)
    loose = built_modules([*kept, *_ALWAYS])
    entries = {*_ALWAYS, *kept}
    entries.update(p for p in _PATTERNS if _hits(p, loose) and not _hits(p, built))
    experts = (module.partition(".layers.")[2] for module in kept if module.endswith(".experts"))
    anchored = (f"*.layers.{tail}" for tail in experts if tail)
    entries.update(p for p in anchored if not _hits(p, built))
    for part, modules in set_aside.items():
        patterns = _patterns_of(part)
        right = [pattern for pattern in patterns if not _hits(pattern, built)]
        entries.update(right)
        if patterns[0] not in right:
            entries.update(modules)
    found = sorted(entries)
    inside = [module for modules in set_aside.values() for module in modules]
    _check(found, built, built_modules([*kept, *inside, *_ALWAYS]))
    return found


def _patterns_of(part: str) -> tuple[str, ...]:
    """Patterns for a part of the model; the first covers it by its full name.

    >>> _patterns_of("mtp"), _patterns_of("model.layers.61"), _patterns_of("model.visual")
    (('mtp*',), ('model.layers.61.*',), ('model.visual*', '*visual*'))
    """
    last = part.rpartition(".")[2]
    if last.isdigit():
        return (f"{part}.*",)
    return (f"{part}*",) if "mtp" in last else (f"{part}*", f"*{last}*")


def _hits(pattern: str, modules: Mapping[str, tuple[str, ...]]) -> bool:
    rules = [rule_of([pattern]) for rule_of in RULES.values()]
    return any(rule(module, members) for module, members in modules.items() for rule in rules)


def _check(
    entries: list[str],
    quantized: Mapping[str, tuple[str, ...]],
    kept: Mapping[str, tuple[str, ...]],
) -> None:
    for runtime, rule_of in RULES.items():
        excluded = rule_of(entries)
        for modules, expected in ((quantized, False), (kept, True)):
            for module, members in modules.items():
                try:
                    right = excluded(module, members) == expected
                except UndecidedError:
                    right = False
                if not right:
                    raise LayoutError(
                        f"{show(module)}: no exclude list tells {runtime} that it is "
                        f"{'not ' * expected}quantized, for its name is part of another's"
                    )
