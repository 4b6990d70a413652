"""What the runs of `bench compare` amount to: medians, minima, ratios, rates.

A rate is marginal: the bytes that the big input has more than the small one, over the time that it
takes longer. Start-up, imports and plan cancel out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from .tools import CP, MOE_CKPT

__all__ = ["marginals", "rows"]

_KEPT_SHARE = 1.5

Run = dict[str, Any]


def rows(document: Run) -> list[Run]:
    """One for each tool, format, form and size.

    ``to_cp``: its median over that of `cp`. ``to_moe_ckpt``: over that of moe-ckpt in the same
    format; None where the tool wrote so much more that it cannot have quantized the experts.
    """
    found = [_row(document, runs) for runs in _cases(document)]
    by_case = {(row["tool"], row["format"], row["form"], row["size"]): row for row in found}
    for row in found:
        copied = by_case.get((CP, "bf16", row["form"], row["size"]))
        ours = by_case.get((MOE_CKPT, row["format"], row["form"], row["size"]))
        row["to_cp"] = _ratio(row, copied) if row["tool"] != CP else None
        row["to_moe_ckpt"] = _ratio(row, ours) if row["tool"] not in (CP, MOE_CKPT) else None
        if ours and row["output_nbytes"] > _KEPT_SHARE * ours["output_nbytes"]:
            row["to_moe_ckpt"] = None
            row["note"] = "experts were not quantized"
    return found


def marginals(document: Run) -> list[Run]:
    """One for each tool, format and form that was measured with both sizes.

    Rates are bytes of input a second, from medians and from minima of time; CPU seconds are for a
    gigabyte. ``median_of_cp``: the rate over that of `cp`. ``median_of_moe_ckpt``: over that of
    moe-ckpt in the same format. Likewise for minima.
    """
    inputs = {(made["form"], made["size"]): made["nbytes"] for made in document["inputs"]}
    sizes: dict[tuple[str, str, str], dict[str, Run]] = {}
    for row in document["rows"]:
        if not row["error"]:
            sizes.setdefault((row["tool"], row["format"], row["form"]), {})[row["size"]] = row
    found: list[Run] = []
    for (tool, name, form), of_size in sizes.items():
        if of_size.keys() != {"small", "big"}:
            continue
        small, big = of_size["small"], of_size["big"]
        nbytes = inputs[form, "big"] - inputs[form, "small"]
        row = {"tool": tool, "format": name, "form": form, "nbytes": nbytes}
        for kind in ("median", "min"):
            seconds = big[f"{kind}_seconds"] - small[f"{kind}_seconds"]
            row[f"{kind}_rate"] = nbytes / seconds if seconds > 0 else None
        row["cpu_seconds_per_gb"] = (big["cpu_seconds"] - small["cpu_seconds"]) / nbytes * 1e9
        found.append(row)
    rates = {(row["tool"], row["format"], row["form"]): row for row in found}
    for row in found:
        copied = rates.get((CP, "bf16", row["form"]))
        ours = rates.get((MOE_CKPT, row["format"], row["form"]))
        for kind in ("median", "min"):
            row[f"{kind}_of_cp"] = _of(row, copied, kind) if row["tool"] != CP else None
            others = row["tool"] not in (CP, MOE_CKPT)
            row[f"{kind}_of_moe_ckpt"] = _of(row, ours, kind) if others else None
    return found


def _cases(document: Run) -> Iterator[list[Run]]:
    cases: dict[tuple[object, ...], list[Run]] = {}
    for run in document["runs"]:
        key = (run["form"], run["size"], run["tool"], run["format"])
        cases.setdefault(key, []).append(run)
    order = {"none": 0, "small": 1, "big": 2}
    yield from sorted(cases.values(), key=lambda runs: (runs[0]["form"], order[runs[0]["size"]]))


def _row(document: Run, runs: list[Run]) -> Run:
    first = runs[0]
    row: Run = {name: first[name] for name in ("form", "size", "tool", "format")}
    row["rounds"] = len(runs)
    row["median_seconds"] = median(_each(runs, "seconds"))
    row["min_seconds"] = min(_each(runs, "seconds"))
    row["cpu_seconds"] = median(_each(runs, "cpu_seconds"))
    row["peak_nbytes"] = max(_each(runs, "peak_nbytes"))
    row["above_torch_nbytes"] = _above_torch(document, row)
    row["output_nbytes"] = first["output_nbytes"]
    row["others"] = max(_each(runs, "others"))
    row["error"] = next((run["error"] for run in runs if run["error"]), None)
    row["note"] = row["error"] or ""
    made = [m for m in document["inputs"] if (m["form"], m["size"]) == (row["form"], row["size"])]
    row["rate"] = made[0]["nbytes"] / row["median_seconds"] if made else None
    return row


def _above_torch(document: Run, row: Run) -> int | None:
    """Peak memory less that of `import torch` in the tool's Python."""
    if row["tool"] in (CP, "import torch"):
        return None
    peaks: dict[str, list[float]] = {}
    for run in document["runs"]:
        if run["tool"] == "import torch":
            peaks.setdefault(run["format"], []).append(run["peak_nbytes"])
    own = peaks.get(row["tool"]) or peaks[MOE_CKPT]
    return int(row["peak_nbytes"] - median(own))


def _each(runs: Iterable[Run], name: str) -> list[float]:
    return [run[name] for run in runs]


def _ratio(row: Run, base: Run | None) -> float | None:
    if not base or row["error"] or row["size"] == "none":
        return None
    return float(row["median_seconds"] / base["median_seconds"])


def _of(row: Run, base: Run | None, kind: str) -> float | None:
    name = f"{kind}_rate"
    return row[name] / base[name] if base and base[name] and row[name] else None
