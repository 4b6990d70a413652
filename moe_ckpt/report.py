"""Plans and results as text for people and as JSON for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .dialects import tensor_name
from .errors import show
from .formats import find_format
from .layouts import Experts
from .plan import Plan
from .planner import make_plan
from .schedule import CPU, peak_nbytes

if TYPE_CHECKING:
    from .conversion import Result

__all__ = ["count_of", "inspect", "plan_document", "plan_lines", "result_lines", "size", "table"]


def inspect(in_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What a default conversion of a folder would do, as a JSON-like document.

    Reads headers only. Raises `InputError` if the checkpoint cannot be converted.
    """
    return plan_document(make_plan(in_dir))


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan as one JSON document; byte counts end in ``_nbytes``."""
    return {
        "schema": "moe-ckpt/plan",
        "version": 1,
        "digest": plan.digest(),
        "model_type": plan.model_type,
        "family": plan.family,
        "loads_in": list(plan.loaders),
        "format": plan.format,
        "quantize": plan.quantize,
        "experts_as": plan.experts_as,
        "experts": [
            {
                "source": found.source,
                "output": found.output,
                "layout": found.layout,
                "gate_up_order": found.order,
                "num_experts": found.num_experts,
                "intermediate_size": found.intermediate,
                "hidden_size": found.hidden,
                "evidence": found.evidence,
            }
            for found in plan.experts
        ],
        "quantized": {
            "matrices": plan.quantized_matrices,
            "source_nbytes": plan.quantized_nbytes,
            "with_statistics": plan.stats_covered,
        },
        "copied": [
            {"reason": reason, "tensors": count, "nbytes": nbytes}
            for reason, count, nbytes in _kept_rows(plan)
        ],
        "source": {
            "shards": len(plan.source_shards),
            "tensors_nbytes": plan.source_nbytes,
            "read_nbytes": plan.read_nbytes,
        },
        "output": {
            "shards": [
                {"name": shard.name, "tensors": len(shard.tensors), "nbytes": shard.nbytes}
                for shard in plan.shards
            ],
            "tensors_nbytes": plan.tensors_nbytes,
            "write_nbytes": plan.write_nbytes,
            "files": [*plan.files, *(file.name for file in plan.side_files)],
            "left_out": list(plan.left_out),
        },
        "peak_memory_nbytes": peak_nbytes(plan, CPU),
        "notes": list(plan.notes),
        "warnings": [
            {"kind": kind, "message": text}
            for kind, texts in plan.warnings_by_kind.items()
            for text in texts
        ],
    }


def plan_lines(plan: Plan) -> Iterator[str]:
    """A plan as lines of text."""
    yield f"Model     {show(plan.model_type)}, family {plan.family}"
    for count, example in _experts_kinds(plan):
        yield (
            f"Experts   {count} layers x {example.num_experts} experts, {_stored(example)}, as in "
            f"{show(example.source)}"
        )
        yield f"Evidence  {example.evidence}"
        yield f"Become    {_outcome(plan, example)}"
    yield f"Format    {plan.format}, spelled as ModelOpt does"
    yield f"Loads in  {_list(plan.loaders) or 'no runtime known'}; not in transformers"
    yield ""
    rows = [
        ("quantized", f"{plan.quantized_matrices:,} matrices", size(plan.quantized_nbytes), ""),
        *(
            ("copied", count_of(count, "tensor"), size(nbytes), reason)
            for reason, count, nbytes in _kept_rows(plan)
        ),
    ]
    yield from table(("", "what", "in source", "why"), rows)
    yield ""
    yield (
        f"Size      {size(plan.source_nbytes)} -> {size(plan.tensors_nbytes)} "
        f"({plan.tensors_nbytes / max(plan.source_nbytes, 1):.0%}), "
        f"{len(plan.source_shards)} -> {count_of(len(plan.shards), 'shard')}"
    )
    yield (
        f"Work      read {size(plan.read_nbytes)}, write {size(plan.write_nbytes)}, at most "
        f"{size(peak_nbytes(plan, CPU))} of memory beside torch on this machine's CPU"
    )
    if plan.stats_files:
        yield (
            f"Stats     {plan.stats_covered:,} of {plan.quantized_matrices:,} quantized matrices "
            "have an activation amax"
        )
    if plan.left_out:
        yield f"Left out  {_list(plan.left_out[:5])}" + (" ..." if len(plan.left_out) > 5 else "")


def result_lines(result: Result) -> Iterator[str]:
    """A finished conversion as lines of text."""
    plan = result.plan
    copied = sum(count for count, _ in plan.kept.values())
    yield (
        f"{plan.quantized_matrices:,} matrices quantized to "
        f"{plan.format}, {count_of(copied, 'tensor')} copied; {size(plan.source_nbytes)} -> "
        f"{size(plan.tensors_nbytes)} in {count_of(len(plan.shards), 'shard')}"
    )
    kinds = [f"{len(texts)} on {kind}" for kind, texts in plan.warnings_by_kind.items() if texts]
    yield (
        f"{result.seconds:.1f} s on {result.device}, "
        f"{size(plan.read_nbytes / max(result.seconds, 1e-9))}/s; "
        f"warnings: {', '.join(kinds) or 'none'}"
    )
    yield f"written to {show(result.out_dir)}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table with aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()


def size(nbytes: float) -> str:
    """Bytes for people, decimal as file sizes are.

    >>> size(999), size(1_500_000), size(2e12)
    ('999 B', '1.5 MB', '2.0 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "shard"), count_of(2000, "tensor")
    ('1 shard', '2,000 tensors')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _stored(experts: Experts) -> str:
    """The layout, and the order of gate and up where it is not the usual one."""
    return experts.layout + (", gate and up interleaved" if experts.is_interleaved else "")


def _outcome(plan: Plan, experts: Experts) -> str:
    """The names that experts get in the output."""
    roles = [part.role for part in find_format(plan.format).parts]
    if plan.experts_as == "fused":
        names = [tensor_name(plan.format, "", role, True) for role in roles]
        leaves = [name.rpartition(".")[2] for name in (experts.gate_up[0], experts.down[0])]
        return f"{show(experts.source)}.{{{', '.join(leaves)}}}{{{', '.join(names)}}}"
    names = [tensor_name(plan.format, "", role, False)[1:] for role in roles]
    last = experts.first + experts.num_experts - 1
    return (
        f"{show(experts.output)}.{{{experts.first} ... {last}}}"
        f".{{{', '.join(experts.projections)}}}.{{{', '.join(names)}}}"
    )


def _kept_rows(plan: Plan) -> list[tuple[str, int, int]]:
    rows = [(reason, count, nbytes) for reason, (count, nbytes) in plan.kept.items()]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def _experts_kinds(plan: Plan) -> list[tuple[int, Experts]]:
    """Layers alike, counted, with the first of each kind."""

    def kind(found: Experts) -> tuple[object, ...]:
        sizes = (found.num_experts, found.intermediate, found.hidden)
        return (found.layout, found.order, found.first, *sizes)

    kinds = Counter(map(kind, plan.experts))
    first = {kind(found): found for found in reversed(plan.experts)}
    return [(count, first[key]) for key, count in kinds.items()]


def _list(names: Iterable[str]) -> str:
    return ", ".join(show(name) for name in names)
