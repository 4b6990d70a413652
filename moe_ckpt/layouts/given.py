"""What the user says about experts, where headers and table cannot tell.

The model type decides first. A user's word settles what is open - a model type that the table does
not have, a square matrix that could be either way up - and never overrules what is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LayoutError, show, show_some
from ..source.strict_json import show_value
from .experts import Experts
from .family import CONCAT, LAYOUTS, ORDERS, SPLIT, Family, Form

__all__ = ["Given", "family_of_unknown", "refuse_contradictions", "with_layout", "with_order"]

# Leaves of experts in model types that the table does not have.
_LEAVES: dict[str, tuple[tuple[str, ...], ...]] = {
    "fused": (("gate_up_proj", "down_proj"),),
    "fused-transposed": (("gate_up_proj", "down_proj"),),
    "stacked": (
        ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        ("gate_proj", "up_proj", "down_proj"),
    ),
    SPLIT: (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")),
}


@dataclass(frozen=True, slots=True)
class Given:
    """``--layout`` and ``--gate-up-order``; None where nothing was said."""

    layout: str | None = None
    order: str | None = None


def with_layout(family: Family, given: Given) -> Family:
    """The family with only the forms that the user allows."""
    if given.layout in (None, SPLIT):
        return family
    forms = tuple(form for form in family.forms if form.layout == given.layout)
    if not forms:
        raise LayoutError(
            f"--layout {given.layout}: family {family.name} is stored as "
            f"{' or '.join(family.layouts)}; leave the option out"
        )
    return replace(family, forms=forms)


def with_order(family: Family, config: Mapping[str, Any], given: Given) -> Family:
    """The family with the order of gate and up that its forms have in this checkpoint."""
    forms = []
    for form in family.forms:
        if form.order_flag and (wrong := _not_true(config, form.order_flag)):
            if given.order is None:
                raise LayoutError(
                    f"config.json: {wrong}, where true means that rows of gate and up are "
                    f"{form.order}; what else it means for the file is not known. If you know, "
                    f"say --gate-up-order {' or '.join(ORDERS)}"
                )
            form = replace(form, order=given.order)
        elif given.order not in (None, form.order) and form.joins_gate_up:
            raise LayoutError(
                f"--gate-up-order {given.order}: family {family.name} stores gate and up "
                f"{form.order} in {form.describe()}; leave the option out"
            )
        forms.append(form)
    return replace(family, forms=tuple(forms))


def refuse_contradictions(experts: Iterable[Experts], given: Given) -> None:
    """Refuse what the user says if the experts that were found say otherwise."""
    for found in experts:
        if given.layout not in (None, found.layout):
            raise LayoutError(
                f"--layout {given.layout}: {show(found.source)} is stored {found.layout}; leave "
                "the option out"
            )
        if given.order is not None and not LAYOUTS[found.layout].joins_gate_up:
            raise LayoutError(
                f"--gate-up-order {given.order}: {show(found.source)} is stored {found.layout}, "
                "which does not have gate and up in one tensor; leave the option out"
            )


def family_of_unknown(model_type: str, names: Iterable[str], given: Given) -> Family:
    """A family for a model type that the table does not have, from the user's word and names.

    Raises:
        LayoutError: the user said too little, or the names are none that are known.
    """
    assert given.layout is not None
    if given.layout not in _LEAVES:
        raise LayoutError(
            f"--layout {given.layout}: is known only for families in the table, and model_type "
            f"{show_value(model_type)} is not in it"
        )
    joins = LAYOUTS[given.layout].joins_gate_up
    if joins and given.order is None:
        raise LayoutError(
            f"model_type {show_value(model_type)} is not in the table of families: with --layout "
            f"{given.layout}, say also --gate-up-order {' or '.join(ORDERS)}"
        )
    if given.order and not joins:
        raise LayoutError(
            f"--gate-up-order {given.order}: layout {given.layout} does not have gate and up in "
            "one tensor; leave the option out"
        )
    expert = r"\.[0-9]+" if given.layout == SPLIT else ""
    suffix = r"\.weight" if given.layout == SPLIT else ""
    found: dict[tuple[str, tuple[str, ...]], str] = {}
    for leaves in _LEAVES[given.layout]:
        any_leaf = "|".join(map(re.escape, leaves))
        pattern = re.compile(
            rf"(.*?)\.[0-9]+\.([A-Za-z_.]*(?:experts|moe)){expert}\.(?:{any_leaf}){suffix}"
        )
        for name in names:
            match = pattern.fullmatch(name)
            if match and "shared" not in match[2]:
                found.setdefault((match[2], leaves), name)
    if len(found) != 1:
        known = " or ".join("/".join(leaves) for leaves in _LEAVES[given.layout])
        raise LayoutError(
            f"model_type {show_value(model_type)} is not in the table of families, and --layout "
            f"{given.layout} does not tell which tensors are experts: "
            + (f"both {show_some(found.values())} may be" if found else f"none is called {known}")
        )
    ((path, leaves),) = found
    projections = leaves if given.layout == SPLIT else _LEAVES[SPLIT][0]
    forms = (
        () if given.layout == SPLIT else (Form(given.layout, path, leaves, given.order or CONCAT),)
    )
    return Family(
        name="given by --layout",
        model_types=(model_type,),
        split=path,
        projections=projections,
        forms=forms,
        runtimes=(),
        in_transformers=False,
        checked="",
    )


def _not_true(config: Mapping[str, Any], key: str) -> str:
    """The first mention of a key that is not true, in a config or its text model; '' if none."""
    text = config.get("text_config")
    for path, level in (("", config), ("text_config.", text if isinstance(text, dict) else {})):
        if key in level and level[key] is not True:
            return f"{path}{key} is {show_value(level[key])}"
    return ""
