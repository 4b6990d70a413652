"""The tables of families and of formats, as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..dialects import DIALECTS, dialect_for
from ..formats import FORMATS, QuantFormat
from ..formats.fitting import tensor_parallel_sizes
from ..layouts import CHECKS, FAMILIES, LAYOUTS, SPLIT, UNSUPPORTED, Family
from ..layouts.wrappers import WRAPPERS
from .text import table

_EXAMPLE = 768  # experts of Qwen3-30B-A3B

__all__ = ["formats_document", "formats_lines", "layouts_document", "layouts_lines"]


def formats_document() -> dict[str, Any]:
    """Number formats and dialects, as a JSON-like document."""
    return {
        "schema": "moe-ckpt/formats",
        "version": 1,
        "formats": [_format_row(row) for row in FORMATS],
        "dialects": [{"name": d.name, "summary": d.summary} for d in DIALECTS],
    }


def formats_lines() -> Iterator[str]:
    """The same as lines of text."""
    rows = []
    for row in FORMATS:
        found = _format_row(row)
        cells: tuple[str, ...] = (row.name, f"{row.bits_per_weight():g}", found["block"])
        cells += (row.activations, found["statistics"], found["sizes"])
        for spelled in found["dialects"]:
            mark = "*" if spelled["default"] else ""
            rows.append((*cells, f"{spelled['name']}{mark}", ", ".join(spelled["loads_in"])))
            cells = ("",) * len(cells)
    head = ("format", "bits", "block", "activations", "statistics", "sizes", "dialect", "loads in")
    yield from table(head, rows)
    yield ""
    yield "bits       of one weight with its scales, but those of which a row or matrix has one"
    yield "block      the weights that share a scale"
    yield "sizes      what the columns of a matrix, and of fp8-block its rows, are multiples of"
    yield "dialect    * is the default; runtimes are those that read Mixture-of-Experts models so,"
    yield "           and which experts of which family they read, `moe-ckpt layouts` says"
    yield ""
    for dialect in DIALECTS:
        yield f"{dialect.name:20}{dialect.summary}"
    yield ""
    for dialect in DIALECTS:
        reasons: dict[str, list[str]] = {}
        for name, reason in dialect.refused.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            yield f"{dialect.name} does not write {', '.join(names)}: {reason}"
    yield ""
    yield f"Tensor parallelism cuts the experts' I; of I = {_EXAMPLE} these leave whole blocks:"
    sizes: dict[tuple[int, ...], list[str]] = {}
    for row in FORMATS:
        sizes.setdefault(tensor_parallel_sizes(row, _EXAMPLE), []).append(row.name)
    for tp, names in sizes.items():
        yield f"  {', '.join(map(str, tp)):20}{', '.join(names)}"


def _format_row(row: QuantFormat) -> dict[str, Any]:
    default = dialect_for([row.name])
    statistics = "not used"
    if row.input_scale:
        statistics = "optional" if row.constant_input_scale else "needed"
    return {
        "name": row.name,
        "summary": row.summary,
        "activations": row.activations,
        "bits_per_weight": row.bits_per_weight(),
        "block": row.scale.block if row.scale else "none",
        "sizes": "any" if row.k_multiple == 1 else str(row.k_multiple),
        "k_multiple": row.k_multiple,
        "n_multiple": row.n_multiple,
        "statistics": statistics,
        "dialects": [
            {
                "name": dialect.name,
                "default": dialect is default,
                "loads_in": list(dialect.spellings[row.name].runtimes),
            }
            for dialect in DIALECTS
            if row.name in dialect.spellings and (row.is_quantized or dialect is default)
        ],
        "refused": [
            {"dialect": dialect.name, "reason": dialect.refused[row.name]}
            for dialect in DIALECTS
            if row.name in dialect.refused
        ],
    }


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
        "around": [
            {
                "model_types": list(wrapper.model_types),
                "beneath": list(wrapper.beneath),
                "loads_in": list(wrapper.runtimes),
            }
            for wrapper in WRAPPERS
        ],
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
        for names, runtimes in _by_runtimes(family):
            yield f"    for      {', '.join(runtimes) or 'no runtime known'}{names}"
        for number_format, runtimes in family.fused_runtimes.items():
            yield (
                f"    fused    {number_format}, --experts fused, for "
                f"{', '.join(runtimes) or 'no runtime known'}"
            )
        if family.instead:
            yield f"    but      {family.instead}"
        yield f"    checked  {CHECKS[family.checked]}"
    yield ""
    yield "Around a text model of one of these, whose experts are stored as its row says"
    for wrapper in WRAPPERS:
        names, roots = ", ".join(wrapper.model_types), " or ".join(wrapper.beneath)
        yield f"  {names}: under {roots}, for {', '.join(wrapper.runtimes)}"
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
        "roots": list(family.roots),
        "read": read,
        "written": split,
        "widths": family.widths,
        "loads_in": {name: list(family.split_runtimes(name)) for name in family.model_types},
        "fused_loads_in": {name: list(found) for name, found in family.fused_runtimes.items()},
        "note": family.instead,
        "checked": family.checked,
    }


def _by_runtimes(family: Family) -> list[tuple[str, tuple[str, ...]]]:
    """Runtimes that read the split form; with the model types where these differ."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for model_type in family.model_types:
        groups.setdefault(family.split_runtimes(model_type), []).append(model_type)
    if len(groups) == 1:
        return [("", next(iter(groups)))]
    return [(f": {', '.join(names)}", runtimes) for runtimes, names in groups.items()]
