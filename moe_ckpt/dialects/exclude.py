"""The list of modules that are not quantized, written so that every runtime reads it alike.

Full names are what runtimes translate when their own module names differ; patterns with a
leading star hold under any prefix. Both are written. Never listed are a single expert (vLLM
would leave its whole layer unquantized) and ``model.layers.1`` without a dot behind it (layers
10 to 19 would match too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import MoeCkptError, show
from .matching import RUNTIMES, PartlyExcludedError, built_modules

__all__ = ["exclude_list"]

# Patterns that hold in every runtime; each is used only where it hits nothing quantized.
_PATTERNS = (
    "*.self_attn*",
    "*.linear_attn*",
    "*.mlp.gate",
    "*.block_sparse_moe.gate",
    "*.mlp.shared_expert_gate",
    "*.mlp.shared_expert*",
    "*.router*",
    "*lm_head",
)
_ALWAYS = ("lm_head",)  # also when tied to the embeddings: vLLM builds one either way
# Above the layers: runtimes order and name these differently.
_WRAPPERS = frozenset({"model", "language_model", "thinker"})


def exclude_list(
    quantized: Sequence[str], kept: Sequence[str], set_aside: Sequence[str]
) -> list[str]:
    """Names and patterns of what is not quantized.

    Args:
        quantized: quantized linear layers, and the experts of each layer as one module.
        kept: linear layers that stay as they are.
        set_aside: linear layers and experts in parts of the model that stay whole.

    Raises:
        MoeCkptError: if a runtime would read the list differently; a bug in this module.
    """
    built = built_modules(quantized)
    parts = dict.fromkeys(pattern for module in set_aside for pattern in _parts_of(module))
    loose = built_modules([*kept, *_ALWAYS])
    useful = [pattern for pattern in _PATTERNS if _hits(pattern, loose)]
    patterns = [pattern for pattern in (*parts, *useful) if not _hits(pattern, built)]
    found = sorted({*_ALWAYS, *kept, *patterns})
    _check(found, built, built_modules([*kept, *set_aside, *_ALWAYS]))
    return found


def _parts_of(module: str) -> tuple[str, ...]:
    """Patterns for the part of the model that is set aside with a module.

    >>> _parts_of("mtp.layers.0.mlp.gate"), _parts_of("model.layers.61.eh_proj")
    (('mtp*',), ('model.layers.61.*',))
    >>> _parts_of("model.visual.blocks.0.attn.qkv")
    ('model.visual*', '*visual*')
    """
    path = module.split(".")
    depth = next((n for n, name in enumerate(path) if name not in _WRAPPERS), 0)
    prefix, part = ".".join(path[: depth + 1]), path[depth]
    if part == "layers":
        return (f"{prefix}.{path[depth + 1]}.*",)
    return (f"{prefix}*",) if "mtp" in part else (f"{prefix}*", f"*{part}*")


def _hits(pattern: str, modules: Mapping[str, tuple[str, ...]]) -> bool:
    return any(
        excluded([pattern], module, members)
        for module, members in modules.items()
        for excluded in RUNTIMES.values()
    )


def _check(
    entries: list[str],
    quantized: Mapping[str, tuple[str, ...]],
    kept: Mapping[str, tuple[str, ...]],
) -> None:
    for runtime, excluded in RUNTIMES.items():
        for modules, expected in ((quantized, False), (kept, True)):
            for module, members in modules.items():
                try:
                    right = excluded(entries, module, members) == expected
                except PartlyExcludedError:
                    right = False
                if not right:
                    raise MoeCkptError(
                        f"{show(module)}: {runtime} would misread whether it is quantized; please "
                        "report this"
                    )
