"""The table of families as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .layouts import CHECKS, FAMILIES, LAYOUTS, UNSUPPORTED, Family
from .loaders import split_loaders

__all__ = ["layouts_document", "layouts_lines"]


def layouts_document() -> dict[str, Any]:
    """Layouts, families and model types that are refused, as a JSON-like document."""
    return {
        "schema": "moe-ckpt/layouts",
        "version": 1,
        "layouts": [
            {"name": layout.name, "tensors": layout.describe(), "summary": layout.summary}
            for layout in LAYOUTS.values()
        ],
        "families": [_row(family) for family in FAMILIES],
        "refused": dict(UNSUPPORTED),
        "checks": dict(CHECKS),
    }


def layouts_lines() -> Iterator[str]:
    """The same as lines of text."""
    yield "Layouts: E experts, I rows of gate and of up, H columns of gate; matrices are [out, in]"
    for layout in LAYOUTS.values():
        yield f"  {layout.name:18}{layout.describe():34}{layout.summary}"
    yield ""
    yield "Families"
    for family in FAMILIES:
        row = _row(family)
        yield f"  {family.name}: {', '.join(family.model_types)}"
        for form in row["read"]:
            order = f", gate and up {form['gate_up_order']}" if form["gate_up_order"] else ""
            yield f"    reads    {form['layout']}{order}: {form['tensors']}"
        yield f"    writes   {row['written']}"
        for names, loaders in _by_loaders(family):
            yield f"    for      {', '.join(loaders) or 'no runtime known'}{names}"
        for number_format, loaders in family.fused_loaders.items():
            yield (
                f"    fused    {number_format}, --experts fused, for "
                f"{', '.join(loaders) or 'no runtime known'}"
            )
        if family.instead:
            yield f"    but      {family.instead}"
        yield f"    checked  {CHECKS[family.checked]}"
    yield ""
    yield "Refused"
    for model_type, reason in UNSUPPORTED.items():
        yield f"  {model_type}: {reason}"


def _row(family: Family) -> dict[str, Any]:
    split = f"{family.split}.E.{{{', '.join(family.projections)}}}.weight"
    read = [
        {
            "layout": form.layout,
            "gate_up_order": form.order if LAYOUTS[form.layout].joins_gate_up else None,
            "tensors": form.describe(),
        }
        for form in family.forms
    ]
    return {
        "family": family.name,
        "model_types": list(family.model_types),
        "read": [*read, {"layout": "split", "gate_up_order": None, "tensors": split}],
        "written": split,
        "loads_in": {name: list(split_loaders(family, name)) for name in family.model_types},
        "fused_loads_in": {name: list(found) for name, found in family.fused_loaders.items()},
        "note": family.instead,
        "checked": family.checked,
    }


def _by_loaders(family: Family) -> list[tuple[str, tuple[str, ...]]]:
    """Loaders of the split form; with the model types where these differ."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for model_type in family.model_types:
        groups.setdefault(split_loaders(family, model_type), []).append(model_type)
    if len(groups) == 1:
        return [("", next(iter(groups)))]
    return [(f": {', '.join(names)}", loaders) for loaders, names in groups.items()]
