"""What a plan claims, against what the loaders of vLLM and SGLang did, as fixtures/loads has it.

Every case was converted, and loaded by the runtime's own code on a CPU, all of whose writes into
parameters were compared with the files. Recorded are the headers that each case was made from, so
that the claim can be made again from the plan alone. ``linear=mxfp8`` is a recipe that gives the
linear layers another format than the experts. An empty verdict was not to be had: the
runtime could not build the model on that machine.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict

import pytest
from kit.files import FIXTURES, write_headers

import moe_ckpt
from moe_ckpt.dialects.modelopt.match import RULES
from moe_ckpt.loaders.judge import LOADERS

LOADS = FIXTURES / "loads"
E = 8
RULE = '[[rule]]\nmatch = "{}"\nformat = "{}"\n'
HOW = ("model", "format", "dialect", "quantize", "experts")
CASES = defaultdict(list)
with (LOADS / "verdicts.csv").open(newline="") as lines:
    for row in csv.DictReader(lines):
        CASES[row["model"]].append(row)
MODELS = json.loads((LOADS / "models.json").read_text())
RUNTIMES = {name: name.partition(" ")[0] for name in next(iter(CASES.values()))[0] if " " in name}


def source_of(folder, model):
    """A checkpoint of headers; an expert that is called ``*`` is eight experts."""
    header = {}
    for kind, names in MODELS[model]["tensors"].items():
        dtype, *shape = kind.split(" ")
        for name in names:
            for expert in range(E) if "*" in name else [0]:
                header[name.replace("*", str(expert))] = (dtype, [int(size) for size in shape])
    return write_headers(folder, {"model.safetensors": header}, MODELS[model]["config"])


def claims_of(source, stats, case):
    """The runtimes that a plan of the case says load it."""
    options = {"experts": case["experts"], "stats": [stats], "missing_stats": "constant"}
    if case["dialect"] != "none":
        options["dialect"] = case["dialect"]
    scope, _, linears = case["quantize"].partition("=")
    if linears:
        recipe = stats.with_name("recipe.toml")
        recipe.write_text(
            RULE.format("*.experts.[0-9]*", case["format"]) + RULE.format("*", linears)
        )
        options["recipe"] = recipe
    else:
        options |= {"format": case["format"], "quantize": scope}
    return moe_ckpt.make_plan(source, **options).runtimes


@pytest.mark.parametrize("model", sorted(CASES))
@pytest.mark.slow
def test_claims_are_what_the_loaders_did(tmp_path, model):
    source = source_of(tmp_path / "in", model)
    stats = tmp_path / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    wrong = []
    for case in CASES[model]:
        claims = claims_of(source, stats, case)
        wrong += [
            (*(case[key] for key in HOW), column, case[column])
            for column, name in RUNTIMES.items()
            if case[column] and (case[column] == "yes") != (name in claims)
        ]
    assert wrong == []


def test_recorded_are_the_versions_that_the_tables_are_of():
    of_tables = {loader.name: loader.version for loader in LOADERS}
    assert set(RUNTIMES) == {f"{name} {of_tables[name]}" for name in RUNTIMES.values()}


def test_recorded_is_enough_to_tell():
    """Both answers of both runtimes, for many models."""
    counts = Counter(
        (name, row[column])
        for rows in CASES.values()
        for row in rows
        for column, name in RUNTIMES.items()
    )
    for name in RUNTIMES.values():
        assert counts[name, "yes"] > 250
        assert counts[name, "no"] > 75
    assert len(CASES) > 35


def plan_of(folder, model, **options):
    stats = folder / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    if options["format"] == "fp8-tensor":
        options |= {"stats": [stats], "missing_stats": "constant"}
    return moe_ckpt.make_plan(source_of(folder / "in", model), **options)


@pytest.mark.parametrize("quantize", ["experts", "linear"])
def test_what_vllm_makes_of_the_exclude_list_of_jamba(tmp_path, quantize):
    """It cuts ``.self_attn.`` out of names, patterns too, before it compares them."""
    plan = plan_of(tmp_path, "jamba", format="nvfp4", quantize=quantize)
    listed = json.loads(plan.files["config.json"])["quantization_config"]["ignore"]
    expanded = [n for e in listed for n in ([e[:-1], f"{e[:-1]}.*"] if e.endswith("*") else [e])]
    cut = [entry.replace(".self_attn.", ".") for entry in expanded]
    experts = "model.layers.1.feed_forward.experts"
    assert not RULES["vLLM"](cut)(experts, (experts,))


def test_what_every_runtime_builds_in_16_bits_stays(tmp_path):
    plan = plan_of(tmp_path, "jamba", format="nvfp4", quantize="linear")
    made = {module for job in plan.jobs for output in job.outputs for module in output.modules}
    assert not [module for module in made if ".mamba." in module]
    assert "model.layers.1.self_attn.q_proj" in made
    assert plan.kept["built in 16 bits by every runtime"][0] == 4


def test_parts_of_a_matrix_that_was_cut_have_one_scale(tmp_path):
    plan = plan_of(tmp_path, "qwen3_5_moe_text", format="fp8-tensor", quantize="linear")
    together = {output.modules for job in plan.jobs for output in job.outputs}
    layer = "model.layers.0.linear_attn"
    assert (f"{layer}.in_proj_qkv", f"{layer}.in_proj_z") in together
    assert ("model.layers.1.self_attn.q_proj",) in together
