"""The time of a plan alone: a sparse checkpoint of headers, as large as Kimi-K2.

384 experts in 60 layers, so that NVFP4 has 276,480 tensors of experts. Each round is a fresh
process that makes the plan, all output headers and the index. WORKDIR needs no room.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from . import processes
from .checkpoints import Shape, in_shards, write_sparse
from .machine import facts
from .report import figures_text

__all__ = ["add_arguments", "once", "run"]

E, I, H = 384, 2048, 7168
_MLA = {
    "q_a_proj.weight": (1536, H),
    "q_a_layernorm.weight": (1536,),
    "q_b_proj.weight": (64 * 192, 1536),
    "kv_a_proj_with_mqa.weight": (576, H),
    "kv_a_layernorm.weight": (512,),
    "kv_b_proj.weight": (64 * 256, 512),
    "o_proj.weight": (H, 64 * 128),
}
_CONFIG = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "hidden_size": H,
    "intermediate_size": 18432,
    "moe_intermediate_size": I,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--format", default="nvfp4", metavar="NAME")
    parser.add_argument("--layers", type=int, default=61, metavar="N", help="the first is dense")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure; returns the document and its text."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"bench": "plan", "machine": facts(), "runs": []}
    with tempfile.TemporaryDirectory(prefix="moe-ckpt-bench-", dir=args.workdir) as name:
        folders = {form: Path(name) / form for form in ("fused", "split")}
        sources: dict[str, int] = {}
        for form, folder in folders.items():
            tensors = list(_tensors(form, args.layers))
            sources[form] = len(tensors)
            config = _CONFIG | {"num_hidden_layers": args.layers}
            write_sparse(folder, in_shards(tensors, 5 * 10**9), config)
        for _ in range(args.rounds):
            for form, folder in folders.items():
                measured, found = processes.call("plan:once", folder, args.format)
                whole = {"process": measured.seconds, "cpu": measured.cpu_seconds}
                whole |= {"peak_nbytes": measured.peak_nbytes, "others": measured.others}
                case = {"form": form, "source_tensors": sources[form]}
                document["runs"].append(case | found | whole)
                print(f"{form}: {sum(found['seconds'].values()):.2f} s", file=sys.stderr)
    document["figures"] = list(_figures(document["runs"]))
    return document, figures_text(document)


def once(folder: str, number_format: str) -> dict[str, Any]:
    """Plan, headers and index once, in seconds; this process imports no torch."""
    from moe_ckpt.planning.planner import make_plan
    from moe_ckpt.texts import header_of, index_of

    times = [perf_counter()]
    plan = make_plan(folder, format=number_format)
    times.append(perf_counter())
    headers = [header_of(shard.tensors) for shard in plan.shards]
    times.append(perf_counter())
    index = index_of(plan) or ""
    times.append(perf_counter())
    assert "torch" not in sys.modules
    spent = [after - before for before, after in pairwise(times)]
    return {
        "seconds": dict(zip(("plan", "headers", "index"), spent, strict=True)),
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
        "headers_nbytes": sum(map(len, headers)),
        "index_nbytes": len(index),
    }


def _figures(runs: list[dict[str, Any]]) -> Iterator[dict[str, object]]:
    for form in dict.fromkeys(found["form"] for found in runs):
        mine = [found for found in runs if found["form"] == form]
        first = mine[0]
        sizes = f"{first['source_tensors']:,} tensors become {first['tensors']:,}"
        for part in ("plan", "headers", "index"):
            yield _figure(f"{form}: {part}", [found["seconds"][part] for found in mine])
        totals = [sum(found["seconds"].values()) for found in mine]
        yield _figure(f"{form}: all three", totals, sizes)
        yield _figure(f"{form}: whole process", [found["process"] for found in mine])
        yield _figure(f"{form}: its CPU time", [found["cpu"] for found in mine])
        peak = max(found["peak_nbytes"] for found in mine) / 2**20
        yield {"what": f"{form}: its peak memory", "value": peak, "unit": "MiB"}


def _figure(what: str, values: list[float], remark: str = "") -> dict[str, object]:
    remark = f"{remark}; " if remark else ""
    remark += f"median {median(values):.2f} of {len(values)}"
    return {"what": what, "value": min(values), "unit": "s", "remark": remark}


def _tensors(form: str, layers: int) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (163840, H)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, shape in _MLA.items():
            yield f"{prefix}.self_attn.{name}", shape
        yield f"{prefix}.input_layernorm.weight", (H,)
        yield f"{prefix}.post_attention_layernorm.weight", (H,)
        if layer == 0:
            yield from _mlp(f"{prefix}.mlp", 18432)
            continue
        yield f"{prefix}.mlp.gate.weight", (E, H)
        yield from _mlp(f"{prefix}.mlp.shared_experts", I)
        if form == "fused":
            yield f"{prefix}.mlp.experts.gate_up_proj", (E, 2 * I, H)
            yield f"{prefix}.mlp.experts.down_proj", (E, H, I)
        else:
            for e in range(E):
                yield from _mlp(f"{prefix}.mlp.experts.{e}", I)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (163840, H)


def _mlp(prefix: str, rows: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (rows, H)
    yield f"{prefix}.up_proj.weight", (rows, H)
    yield f"{prefix}.down_proj.weight", (H, rows)
