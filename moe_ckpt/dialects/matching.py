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

__all__ = ["RUNTIMES", "PartlyExcludedError", "Rule", "built_modules", "sglang", "trtllm", "vllm"]

# Asked for a module that a runtime builds, and its members: is it excluded?
Rule = Callable[[str, tuple[str, ...]], bool]

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


def vllm(entries: Iterable[str]) -> Rule:
    """vLLM's rule for a list; it raises `PartlyExcludedError` where vLLM refuses to load."""
    expanded: list[str] = []
    for entry in entries:
        expanded += [entry[:-1], f"{entry[:-1]}.*"] if entry.endswith("*") else [entry]
    listed = frozenset(expanded)
    globs = _matcher(expanded)
    of_experts = [entry for entry in expanded if "experts" in entry]

    def excluded(module: str, members: tuple[str, ...]) -> bool:
        if _all_listed(members, listed.__contains__):
            return True
        if module.endswith(".experts") and any(module in entry for entry in of_experts):
            return True
        return globs(module) or any(entry in module for entry in expanded)

    return excluded


def sglang(entries: Iterable[str]) -> Rule:
    """SGLang's rule for a list; it raises `PartlyExcludedError` where SGLang refuses to load."""
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
        return below(module) or _all_listed(members, below)

    return excluded


def trtllm(entries: Iterable[str]) -> Rule:
    """TensorRT-LLM's rule for a list; a fused module counts by its first member."""
    globs = _matcher(entries)

    def excluded(_module: str, members: tuple[str, ...]) -> bool:
        parts = members[0].split(".")
        return any(globs(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    return excluded


RUNTIMES: dict[str, Callable[[Iterable[str]], Rule]] = {
    "vLLM": vllm,
    "SGLang": sglang,
    "TensorRT-LLM": trtllm,
}


def _matcher(entries: Iterable[str]) -> Callable[[str], bool]:
    """Whether a whole name equals an entry, or fits one with ``*`` for any text."""
    listed = frozenset(entries)
    patterns = [".*".join(map(re.escape, e.split("*"))) for e in sorted(listed) if "*" in e]
    pattern = re.compile("|".join(patterns)) if patterns else None

    def matches(name: str) -> bool:
        return name in listed or bool(pattern and pattern.fullmatch(name))

    return matches


def _all_listed(members: tuple[str, ...], listed: Callable[[str], bool]) -> bool:
    found = [listed(name) for name in members]
    if any(found) and not all(found):
        raise PartlyExcludedError(members)
    return all(found)
