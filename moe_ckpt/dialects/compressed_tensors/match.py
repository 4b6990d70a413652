"""How each runtime reads ``ignore`` and ``targets`` of ``quant_method: compressed-tensors``.

An entry is a name, or after ``re:`` a regular expression for the start of a name, or the class
``Linear``. The list ``ignore`` comes first everywhere. Experts of a layer are asked about by the
names of the first one's matrices.

    vLLM          ignore: the name, else all members of a fused module. targets: the first that
                  fits the name, then the members of a fused module, then the class; what none
                  fits is not quantized (compressed_tensors/utils.py; compressed_tensors.py,
                  get_scheme_dict). It translates names to its own, not expressions
    SGLang        ignore: the name or the end of it from a component on; for fused modules the
                  members, if the model says which they are. targets: the first that fits the
                  name, then the class, then the members; what none fits is refused. It asks for
                  ``gate_proj``, ``up_proj``, ``down_proj`` of experts whatever they are called, and
                  the output head is quantized only where a target names it
                  (compressed_tensors/utils.py; compressed_tensors.py, get_moe_scheme)
    transformers  through the library: of several targets the first in the order of names,
                  expressions, classes, each sorted (compressed_tensors/utils/match.py)
    TensorRT-LLM  one group: ignore is a list as ModelOpt's, and expressions are for the whole
                  name; older versions do not know them. Several groups: as the library, but
                  every target must fit some name and classes are refused
                  (models/quant_config_utils.py)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from ...runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..matching import Built, Reader, UndecidedError, all_or_none
from ..modelopt.match import trtllm

__all__ = ["LINEAR", "compressed_readers", "fits"]

LINEAR = "Linear"
_SGLANG_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def fits(entry: str, name: str) -> bool:
    """Whether an entry is the name, or an expression for its start.

    >>> fits("re:.*gate", "mlp.gate_proj"), fits("re:.*gate$", "mlp.gate_proj")
    (True, False)
    """
    if entry.startswith("re:"):
        return _compiled(entry[3:]).match(name) is not None
    return entry == name


def compressed_readers(ignore: Sequence[str], targets: Mapping[str, str]) -> dict[str, Reader]:
    """How each runtime reads a configuration: its list, and target -> format in their order."""
    several = len(set(targets.values())) > 1
    return {
        VLLM: _vllm(ignore, targets),
        SGLANG: _sglang(ignore, targets),
        TRANSFORMERS: _library(ignore, targets),
        TRTLLM: _library(ignore, targets) if several else _trtllm(ignore, targets),
    }


def _one_of(found: Sequence[str | None], module: Built) -> str | None:
    if len(set(found)) > 1:
        raise UndecidedError(module.name)
    return found[0]


def _by_name(name: str, targets: Mapping[str, str]) -> str | None:
    return next((found for target, found in targets.items() if fits(target, name)), None)


def _by_members(module: Built, targets: Mapping[str, str]) -> str | None:
    """The format of the first member, if each fits some target; as all three runtimes do it."""
    found = [_by_name(member, targets) for member in module.members]
    return found[0] if len(found) > 1 and all(found) else None


def _vllm(ignore: Sequence[str], targets: Mapping[str, str]) -> Reader:
    def listed(name: str) -> bool:
        return any(fits(entry, name) for entry in ignore)

    def of_linear(module: Built) -> str | None:
        if listed(module.name) or all_or_none(module.members, listed):
            return None
        found = _by_name(module.name, targets) or _by_members(module, targets)
        # The output head is no linear layer to it.
        is_linear = module.name.rpartition(".")[2] != "lm_head"
        return found or (targets.get(LINEAR) if is_linear else None)

    def read(module: Built) -> str | None:
        if not module.is_experts:
            return of_linear(module)
        found = [
            None if listed(name) else _by_name(name, targets) or targets.get(LINEAR)
            for name in module.members
        ]
        return _one_of(found, module)

    return read


def _sglang(ignore: Sequence[str], targets: Mapping[str, str]) -> Reader:
    def listed(name: str) -> bool:
        return any(
            fits(entry, name) or (not entry.startswith("re:") and name.endswith(f".{entry}"))
            for entry in ignore
        )

    def look_up(name: str, module: Built, has_mapping: bool) -> str | None:
        found = _by_name(name, targets) or targets.get(LINEAR)
        if found is None and has_mapping:
            found = _by_members(module, targets)
        if found is None:
            raise UndecidedError(name)
        return found

    def of_linear(module: Built, has_mapping: bool) -> str | None:
        if has_mapping and len(module.members) > 1 and module.name not in ignore:
            ignored = all_or_none(module.members, listed)
        else:
            ignored = listed(module.name)
        return None if ignored else look_up(module.name, module, has_mapping)

    def read(module: Built) -> str | None:
        if module.is_experts:
            names = [f"{module.name}.0.{projection}" for projection in _SGLANG_PROJECTIONS]
            found = [None if listed(name) else look_up(name, module, False) for name in names]
            return _one_of(found, module)
        if module.name.rpartition(".")[2] == "lm_head":
            return None if listed(module.name) else _by_name(module.name, targets)
        return _one_of([of_linear(module, True), of_linear(module, False)], module)

    return read


def _library(ignore: Sequence[str], targets: Mapping[str, str]) -> Reader:
    ordered = {t: targets[t] for t in sorted(targets, key=lambda target: ("re:" in target, target))}

    def of_matrix(name: str) -> str | None:
        if any(fits(entry, name) for entry in ignore):
            return None
        return _by_name(name, ordered) or ordered.get(LINEAR)

    return lambda module: _one_of([of_matrix(name) for name in module.members], module)


def _trtllm(ignore: Sequence[str], targets: Mapping[str, str]) -> Reader:
    """Its rule for one group: as for ModelOpt's list, and expressions for whole names."""
    by_name = trtllm([entry for entry in ignore if not entry.startswith("re:")])
    whole = [_compiled(entry[3:]) for entry in ignore if entry.startswith("re:")]
    only = next(iter(targets.values()), None)
    excluded: Callable[[Built], bool] = lambda module: (  # noqa: E731
        by_name(module.name, module.linears)
        or any(expression.fullmatch(name) for expression in whole for name in module.linears)
    )
    return lambda module: None if excluded(module) else only
