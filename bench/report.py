"""Documents of measurements as text, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .machine import BUSY_LIMIT

__all__ = ["compare_text", "figures_text", "machine_text", "table"]

Document = dict[str, Any]


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """An aligned table; columns of numbers are flush right."""
    lines = [[*line] for line in lines]
    columns = list(zip(headings, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    cells = [[cell for cell in column[1:] if cell] for column in columns]
    right = [all(cell[0].isdigit() for cell in column) for column in cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [[*headings], *lines]
    )


def machine_text(machine: Document) -> str:
    """The facts, in three lines."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f"; {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['date']}, commit {machine['commit']}, Python {machine['python']}, {packages}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_nbytes'] / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}{gpu}\n"
        f"before: {machine['busy']:.0%} busy, load {machine['load']}"
    )


def compare_text(document: Document) -> str:
    """Tables of runs and of rates."""
    inputs = {(made["form"], made["size"]): made for made in document["inputs"]}
    busy = [found["busy"] for found in document["rounds"]]
    parts = [machine_text(document["machine"])]
    if document["llm_compressor"]:
        parts[0] += f"\nllm-compressor's Python: {document['llm_compressor']}"
    parts[0] += "\nbusy before rounds: " + ", ".join(f"{share:.0%}" for share in busy)
    if any(share > BUSY_LIMIT for share in busy):
        parts[0] += "  NOT IDLE: figures are worth little"
    lines = []
    for row in document["rows"]:
        made = inputs.get((row["form"], row["size"]))
        lines.append(
            [
                f"{row['form']} {made['nbytes'] / 1e9:.2f} GB" if made else row["form"],
                row["tool"],
                row["format"],
                str(row["rounds"]),
                f"{row['median_seconds']:.2f}",
                f"{row['min_seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['peak_nbytes'] / 2**20:.0f}",
                _number(row["above_torch_nbytes"], "{:.0f}", 2**20),
                _number(row["rate"], "{:.2f}", 1e9),
                f"{row['output_nbytes'] / 1e9:.2f}" if row["output_nbytes"] else "",
                f"{row['others']:.0%}",
                _number(row["to_cp"], "{:.2f}"),
                _number(row["to_moe_ckpt"], "{:.1f}"),
                row["note"],
            ]
        )
    parts.append(
        table(
            "input|tool|format|rounds|median s|min s|CPU s|peak MiB|above torch|GB/s|out GB|others"
            "|x cp|x moe-ckpt|note".split("|"),
            lines,
        )
    )
    if document["marginals"]:
        parts.append(
            "Rates between the sizes: bytes more over seconds more\n" + _rates_text(document)
        )
    return "\n\n".join(parts)


def _rates_text(document: Document) -> str:
    lines = [
        [
            row["form"],
            row["tool"],
            row["format"],
            _number(row["median_rate"], "{:.2f}", 1e9),
            _number(row["min_rate"], "{:.2f}", 1e9),
            f"{row['cpu_seconds_per_gb']:.2f}",
            _number(row["median_of_cp"], "{:.3f}"),
            _number(row["min_of_cp"], "{:.3f}"),
            _number(row["median_of_moe_ckpt"], "{:.1f}", inverse=True),
            _number(row["min_of_moe_ckpt"], "{:.1f}", inverse=True),
        ]
        for row in document["marginals"]
    ]
    heading = "input|tool|format|GB/s of medians|of minima|CPU s/GB|of cp, medians|minima"
    return table([*heading.split("|"), "x moe-ckpt", "minima"], lines)


def figures_text(document: Document) -> str:
    """A table of what was measured, one figure a line: its name, value, unit and remark."""
    lines = [
        [figure["what"], _figure(figure["value"]), figure["unit"], figure.get("remark", "")]
        for figure in document["figures"]
    ]
    heading = ["what", "value", "unit", "remark"]
    return f"{machine_text(document['machine'])}\n\n{table(heading, lines)}"


def _figure(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value:,}"


def _number(value: float | None, form: str, unit: float = 1, *, inverse: bool = False) -> str:
    if value is None:
        return ""
    return form.format(1 / value if inverse else value / unit)
