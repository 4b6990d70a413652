"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ..dialects import find_dialect
from ..errors import show
from ..formats import find_format
from ..layouts import Experts
from ..limits import Limits
from ..plan import Plan
from ..runtimes import TRANSFORMERS
from ..words import count_of
from ..work.batches import peak_nbytes
from .text import left_out_lines, size, table

__all__ = ["plan_document", "plan_lines"]


def plan_document(plan: Plan, limits: Limits | None = None) -> dict[str, Any]:
    """A plan as one JSON document; byte counts end in ``_nbytes``."""
    return {
        "schema": "moe-ckpt/plan",
        "version": 1,
        "digest": plan.digest(),
        "model_type": plan.model_type,
        "family": plan.family,
        "loads_in": list(plan.runtimes),
        "runtimes": [
            {
                "name": verdict.runtime,
                "loads": not verdict.why_not,
                "why_not": verdict.why_not,
                "garbage": verdict.garbage,
            }
            for verdict in plan.verdicts
        ],
        "formats": dict(plan.formats),
        "dialect": plan.dialect,
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
            "source_nbytes": plan.converted_nbytes,
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
        "peak_memory_nbytes": peak_nbytes(plan, limits or Limits()),
        "notes": list(plan.notes),
        "warnings": [
            {"kind": kind, "message": text}
            for kind, texts in plan.warnings_by_kind.items()
            for text in texts
        ],
    }


def plan_lines(plan: Plan, limits: Limits | None = None) -> Iterator[str]:
    """A plan as lines of text."""
    yield f"Model     {show(plan.model_type)}, family {plan.family}"
    for count, example in _experts_kinds(plan):
        yield (
            f"Experts   {count_of(count, 'layer')} x {count_of(example.num_experts, 'expert')}, "
            f"{_stored(example)}, as in "
            f"{show(example.source)}"
        )
        yield f"Evidence  {example.evidence}"
        yield f"Become    {_outcome(plan, example)}"
    for name, count in plan.formats.items():
        yield f"Format    {name}: {count_of(count, 'matrix')}, {find_format(name).summary}"
    yield f"Dialect   {plan.dialect}: {find_dialect(plan.dialect).summary}"
    elsewhere = "" if TRANSFORMERS in plan.runtimes else "; not in transformers"
    yield f"Loads in  {_list(plan.runtimes) or 'no runtime known'}{elsewhere}"
    for name, why_not, garbage in plan.verdicts:
        if name != TRANSFORMERS and (why_not or garbage):
            yield f"Not in    {name}: {why_not or f'it computes garbage: {garbage}'}"
    yield ""
    rows = [
        (
            "converted",
            count_of(sum(plan.formats.values()), "matrix"),
            size(plan.converted_nbytes),
            "",
        ),
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
        f"{size(peak_nbytes(plan, limits or Limits()))} of memory beside the program itself"
    )
    if plan.stats_files:
        yield (
            f"Stats     {plan.stats_covered:,} of {plan.quantized_matrices:,} quantized matrices "
            "have an activation amax"
        )
    yield from left_out_lines(plan.left_out)


def _stored(experts: Experts) -> str:
    """The layout, and the order of gate and up where it is not the usual one."""
    return experts.layout + (", gate and up interleaved" if experts.is_interleaved else "")


def _outcome(plan: Plan, experts: Experts) -> str:
    """The names that experts get in the output."""
    job = next(job for job in plan.jobs if _is_of(job.outputs[0].modules[0], experts))
    dialect = find_dialect(plan.dialect)
    roles = [part.role for part in job.parts]
    if job.is_stacked:
        names = [dialect.tensor_name(job.format, "", role, True) for role in roles]
        leaves = [name.rpartition(".")[2] for name in (experts.gate_up[0], experts.down[0])]
        return f"{show(experts.source)}.{{{', '.join(leaves)}}}{{{', '.join(names)}}}"
    names = [dialect.tensor_name(job.format, "", role, False)[1:] for role in roles]
    last = experts.first + experts.num_experts - 1
    return (
        f"{show(experts.output)}.{{{experts.first} ... {last}}}"
        f".{{{', '.join(experts.projections)}}}.{{{', '.join(names)}}}"
    )


def _is_of(module: str, experts: Experts) -> bool:
    return module.startswith((f"{experts.output}.", f"{experts.source}."))


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
