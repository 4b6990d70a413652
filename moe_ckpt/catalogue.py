"""The table of families as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .layouts import CHECKS, FAMILIES, LAYOUTS, SPLIT, UNSUPPORTED, Family
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
    yield "Gate and up in one tensor: concat is all rows of gate, then all of up; interleaved is a"
    yield "row of gate, a row of up, and so on. In fused-transposed they are columns."
    yield ""
    yield "Families; the runtimes are those that read the experts under these names, where they"
    yield "read the number format"
    for family in FAMILIES:
        row = _row(family)
        yield f"  {family.name}: {', '.join(family.model_types)}"
        for form in row["read"]:
            order = f", gate and up {form['gate_up_order']}" if form["gate_up_order"] else ""
            biases = ", with biases" if form["biases"] else ""
            yield f"    reads    {form['layout']}{order}{biases}: {form['tensors']}"
        if family.widths > 1:
            yield f"    widths   {family.widths} groups of experts in a layer, each of its own"
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
    split = family.describe_split()
    read: list[dict[str, Any]] = [
        {
            "layout": form.layout,
            "gate_up_order": form.order if form.joins_gate_up else None,
            "biases": list(form.biases),
            "tensors": form.describe(),
        }
        for form in family.forms
    ]
    if family.reads_split:
        read.append({"layout": SPLIT, "gate_up_order": None, "biases": [], "tensors": split})
    return {
        "family": family.name,
        "model_types": list(family.model_types),
        "read": read,
        "written": split,
        "widths": family.widths,
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
