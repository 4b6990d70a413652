"""What must hold across the layers of a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set

from ..errors import LayoutError, Problems, show, show_some
from ..source.headers import TensorInfo
from .experts import Experts
from .family import SPLIT
from .roles import module_of, reason_to_keep

__all__ = ["check_layers", "refuse_disagreement", "stack_of"]

_MTP_ONLY = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens|\w*mtp\w*)(\.|$)")


def stack_of(layer: str) -> str:
    """``model.layers`` of ``model.layers.3``."""
    return layer.rpartition(".")[0]


def refuse_disagreement(experts: list[Experts], problems: Problems) -> None:
    """All layers of one stack must have the same sizes, and those that are fused one layout."""
    layers: dict[str, list[Experts]] = defaultdict(list)
    for found in experts:
        layers[found.layer].append(found)
    first_of: dict[str, tuple[str, list[tuple[int, int, int]]]] = {}
    fused_of: dict[str, Experts] = {}
    reported = set()
    for layer, groups in layers.items():
        stack, one = stack_of(layer), groups[0]
        sizes = [(found.num_experts, found.intermediate, found.hidden) for found in groups]
        source, expected = first_of.setdefault(stack, (one.source, sizes))
        if sizes != expected and stack not in reported:
            reported.add(stack)
            problems.add(
                LayoutError,
                f"{show(one.source)}: (E, I, H) is {_sizes(sizes)}, {show(source)} has "
                f"{_sizes(expected)}",
            )
        if one.layout == SPLIT:
            continue
        first = fused_of.setdefault(stack, one)
        if one.layout != first.layout and stack not in reported:
            reported.add(stack)
            problems.add(
                LayoutError,
                f"{show(one.source)}: is stored {one.layout}, {show(first.source)} is stored "
                f"{first.layout}",
            )


def _sizes(sizes: list[tuple[int, int, int]]) -> str:
    return " and ".join(map(str, sizes))


def check_layers(
    tensors: Mapping[str, TensorInfo],
    with_experts: Set[str],
    routers: Set[tuple[int, int]],
    num_layers: int | None,
    problems: Problems,
) -> None:
    """Report layers that config.json and the tensors do not agree on.

    They are a layer with a router (of shape [E, H]) and no experts, and ordinary layers beyond the
    last one of config.json. What is missing is said in `what_is_missing`.
    """
    stacks = set(map(stack_of, with_experts))
    beyond: dict[str, bool] = {}
    for name, info in tensors.items():
        match = re.match(r"((.+?)\.([0-9]{1,9}))\.(.+)", name)
        if match is None or match[2] not in stacks:
            continue
        layer, number = match[1], int(match[3])
        if num_layers is not None and number >= num_layers:
            beyond[layer] = beyond.get(layer, False) or bool(_MTP_ONLY.search(match[4]))
        elif (
            layer not in with_experts
            and info.shape in routers
            and reason_to_keep(module_of(name)) == "router"
        ):
            problems.add(
                LayoutError, f"{show(name)}: is a router, but {show(layer)} has no experts"
            )
    ordinary = [layer for layer, is_mtp in beyond.items() if not is_mtp]
    if ordinary:
        problems.add(
            LayoutError,
            f"{show_some(ordinary)}: config.json says num_hidden_layers={num_layers}, and these do "
            "not look like multi-token prediction (eh_proj, enorm, hnorm)",
        )
