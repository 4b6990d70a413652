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

transformers has no quantizer for ModelOpt's files and reads no such list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

__all__ = ["RUNTIMES", "built_modules", "excluded_by_sglang", "excluded_by_trtllm"]
__all__ += ["PartlyExcludedError", "excluded_by_vllm"]

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

_MLA_PROJECTIONS = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})


class PartlyExcludedError(Exception):
    """Some members of a fused module are excluded, some are not: runtimes refuse to load it."""


def built_modules(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules a runtime builds for these, with their members: fused where all are there.

    >>> built_modules(["l.attn.q_proj", "l.attn.k_proj", "l.attn.v_proj", "l.attn.o_proj"])
    {'l.attn.qkv_proj': ('l.attn.q_proj', 'l.attn.k_proj', 'l.attn.v_proj'), \
'l.attn.o_proj': ('l.attn.o_proj',)}
    """
    names = set(modules)
    built: dict[str, tuple[str, ...]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for fused, leaves in FUSED.items():
            members = tuple(f"{parent}.{name}" for name in leaves)
            if leaf in leaves and names.issuperset(members):
                built[f"{parent}.{fused}"] = members
                break
        else:
            built[module] = (module,)
    return built


def excluded_by_vllm(entries: Iterable[str], module: str, members: tuple[str, ...]) -> bool:
    """vLLM's decision for one module it builds; `PartlyExcludedError` where it refuses."""
    expanded: list[str] = []
    for entry in entries:
        expanded += [entry[:-1], f"{entry[:-1]}.*"] if entry.endswith("*") else [entry]
    if _all_listed(members, set(expanded).__contains__):
        return True
    if module.endswith(".experts") and any("experts" in e and module in e for e in expanded):
        return True
    return any(entry in module or _glob(module, entry) for entry in expanded)


def excluded_by_sglang(entries: Iterable[str], module: str, members: tuple[str, ...]) -> bool:
    """SGLang's decision for one module it builds; `PartlyExcludedError` where it refuses."""
    entries = list(entries)
    candidates = (module, *module.split("."))
    for entry in entries:
        if entry in candidates:
            return True
        pattern = entry.replace(".", r"\.").replace("*", ".*")
        if "*" in entry and any(re.fullmatch(pattern, candidate) for candidate in candidates):
            return True
        tail = entry.rpartition(".")[2]
        if tail in _MLA_PROJECTIONS and tail in module.rpartition(".")[2]:
            return True

    def listed(name: str) -> bool:
        return any(name == entry or name.startswith(entry + ".") for entry in entries)

    return listed(module) or _all_listed(members, listed)


def excluded_by_trtllm(entries: Iterable[str], _module: str, members: tuple[str, ...]) -> bool:
    """TensorRT-LLM's decision: a fused module counts by its first member."""
    parts = members[0].split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(_glob(candidate, entry) for entry in entries for candidate in names)


RUNTIMES = {
    "vLLM": excluded_by_vllm,
    "SGLang": excluded_by_sglang,
    "TensorRT-LLM": excluded_by_trtllm,
}


def _glob(name: str, entry: str) -> bool:
    return name == entry or ("*" in entry and fnmatchcase(name, entry))


def _all_listed(members: tuple[str, ...], listed: Callable[[str], bool]) -> bool:
    found = [listed(name) for name in members]
    if any(found) and not all(found):
        raise PartlyExcludedError(members)
    return all(found)
