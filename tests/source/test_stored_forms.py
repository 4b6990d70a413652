"""Every form in the table of families, with weights that say where they belong.

A swap of gate and up, of experts or of layers, a transposition or a wrong order changes bytes.
"""

from __future__ import annotations

import pytest
import torch
from kit.command import run_here
from kit.expert_layouts import (
    CODECS,
    check,
    config_of,
    expected_parts,
    load,
    matrices_of,
    pack,
    write,
)
from kit.files import FIXTURES, read_files
from kit.stored_forms import CUT, FORMS, LAYERS, E, make
from kit.with_scales import encode

import moe_ckpt
from moe_ckpt.conversion import execute
from moe_ckpt.engines import backend_for
from moe_ckpt.formats import find_format, nvfp4
from moe_ckpt.layouts.family import Form

SIZES = [(32, 48), (32, 64), (48, 48), (16, 128)]  # neither square; gate_up; down; long


def ids(value):
    if isinstance(value, Form):
        return f"{value.layout}-{value.leaves[0]}"
    return getattr(value, "name", None)


@pytest.mark.parametrize(("family", "form"), FORMS, ids=ids)
@pytest.mark.parametrize(("i", "h"), SIZES)
def test_every_matrix_has_its_own_weights(tmp_path, family, form, i, h):
    matrices, biases = make(tmp_path / "in", family, form, i, h)
    twice = sum(other.leaves == form.leaves for other in family.forms) > 1
    square = twice and (2 * i == h or i == h)
    moe_ckpt.convert(
        tmp_path / "in", tmp_path / "out", experts="split", layout=form.layout if square else None
    )
    check(tmp_path / "out", expected_parts(matrices, "nvfp4") | biases)


KINDS = {(form.layout, form.order, bool(form.biases)): (family, form) for family, form in FORMS}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("budget", CUT, ids=lambda budget: str(budget.stage_nbytes))
@pytest.mark.parametrize("as_", ["split", "fused"])
def test_no_byte_depends_on_the_budget(tmp_path, kind, budget, as_):
    family, form = KINDS[kind]
    if as_ == "fused" and not family.fused_runtimes:
        family, form = next((f, o) for f, o in FORMS if f.fused_runtimes)
    make(tmp_path / "in", family, form, 48, 32)
    plan = moe_ckpt.make_plan(tmp_path / "in", experts=as_)
    execute(plan, tmp_path / "a", backend=backend_for("cpu"))
    execute(plan, tmp_path / "b", backend=backend_for("cpu"), budget=budget)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


@pytest.mark.parametrize("number_format", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("i", "h"), SIZES)
def test_fused_output_is_the_source_quantized_in_place(tmp_path, number_format, dtype, i, h):
    """One amax for all experts, blocks along the input, everything [E, in, out]."""
    family, form = next((f, o) for f, o in FORMS if f.name == "gpt_oss")
    make(tmp_path / "in", family, form, i, h, dtype=dtype)
    stats = tmp_path / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    moe_ckpt.convert(
        tmp_path / "in",
        tmp_path / "out",
        format=number_format,
        stats=[stats],
        missing_stats="constant",
    )
    codec, suffixes = CODECS[number_format]
    expected = {}
    for name, stored in load(tmp_path / "in").items():
        if name.endswith("_bias"):
            expected[name] = stored
            continue
        weight = stored.transpose(1, 2).contiguous()
        amax = weight.abs().max().float().view(1)
        parts = encode(codec, weight, amax.expand(E))
        for role, suffix in suffixes.items():
            part = parts[role]
            key = f"{name}_weight{suffix}" if suffix else name
            expected[key] = part.transpose(1, 2) if part.dim() == 3 else part[0]
        expected[f"{name}_input_scale"] = torch.tensor(1.0)
    check(tmp_path / "out", expected)


@pytest.mark.parametrize("model", ["llama4", "gpt_oss"])
def test_split_decodes_to_the_quantized_matrices_of_the_source(tmp_path, model):
    out = tmp_path / "out"
    moe_ckpt.convert(FIXTURES / model / "source", out, experts="split")
    found = load(out)
    count = 0
    for name, stored in load(FIXTURES / model / "source").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        prefix, _, leaf = name.rpartition(".")
        for e, weight in enumerate(stored.transpose(1, 2)):
            names = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
            halves = [weight]
            if leaf != "down_proj":
                halves = [weight[0::2], weight[1::2]] if model == "gpt_oss" else weight.chunk(2)
            amax = weight.abs().max().float().view(1)
            for projection, half in zip(names, halves, strict=True):
                parts = encode(find_format("nvfp4"), half.contiguous()[None], amax)
                ours = {
                    role: found[f"{prefix}.{e}.{projection}.weight{suffix}"][None]
                    for role, suffix in CODECS["nvfp4"][1].items()
                }
                assert torch.equal(nvfp4.dequantize(ours), nvfp4.dequantize(parts))
                count += 1
    assert count == 2 * 4 * 3  # layers, experts, projections


def test_two_widths_in_one_layer(tmp_path):
    """ERNIE-VL: vision experts follow the text experts in one range of numbers."""
    tensors, matrices = {}, {}
    for layer in range(LAYERS):
        experts = [*matrices_of(E, 32, 48), *matrices_of(E, 16, 48, seed=E)]
        for e, projections in enumerate(experts):
            module = f"model.layers.{layer}.mlp.experts.{e}"
            names = ("gate_proj", "up_proj", "down_proj")
            matrices[module] = dict(zip(names, projections, strict=True))
            tensors |= {f"{module}.{n}.weight": m for n, m in matrices[module].items()}
    config = {"model_type": "ernie4_5_vl_moe", "moe_num_experts": E, "hidden_size": 48}
    config |= {"moe_intermediate_size": [32, 16], "num_hidden_layers": LAYERS}
    write(tmp_path / "in", tensors, config)
    plan = moe_ckpt.convert(tmp_path / "in", tmp_path / "out").plan
    check(tmp_path / "out", expected_parts(matrices, "nvfp4"))
    assert [(e.first, e.num_experts, e.intermediate) for e in plan.experts] == [
        (0, E, 32),
        (E, E, 16),
    ] * LAYERS
    assert "model.layers.0.mlp.text_experts_gate" in plan.files["config.json"]
    recipe = tmp_path / "recipe.toml"
    rules = [f'[[rule]]\nmatch = "*.experts.[{n}].*"\nformat = "nvfp4"\n' for n in ("0-2", "3-5")]
    recipe.write_text("\n".join(rules))
    assert moe_ckpt.make_plan(tmp_path / "in", recipe=recipe).formats == plan.formats


@pytest.mark.parametrize(
    ("level", "said", "order"),
    [
        ("text", None, None),
        ("text", True, None),
        ("text", False, "concat"),
        ("text", False, "interleaved"),
        ("top", 0, "concat"),
    ],
)
def test_inkling_may_leave_open_how_gate_and_up_lie(tmp_path, level, said, order):
    """Its flag says how runtimes lay out rows; what else than true says of the file is unknown."""
    family, form = next((f, o) for f, o in FORMS if f.name == "inkling")
    experts = matrices_of(E, 32, 48)
    prefix = "model.llm.layers.0.mlp.experts"
    names = [f"{prefix}.{leaf}" for leaf in form.leaves]
    text = {"n_routed_experts": E, "moe_intermediate_size": 32, "hidden_size": 48}
    flag = {} if said is None else {"inference_moe_w13_interleaved": said}
    config = {"model_type": "inkling_mm_model", "text_config": text}
    (config if level == "top" else text).update(flag)
    stored = pack("fused", order or form.order, experts)
    write(tmp_path / "in", dict(zip(names, stored, strict=True)), config)
    if order:
        with pytest.raises(moe_ckpt.LayoutError, match="say --gate-up-order"):
            moe_ckpt.make_plan(tmp_path / "in", experts="split")
    moe_ckpt.convert(tmp_path / "in", tmp_path / "out", experts="split", gate_up_order=order)
    matrices = {
        f"{prefix}.{e}": dict(zip(family.projections, projections, strict=True))
        for e, projections in enumerate(experts)
    }
    check(tmp_path / "out", expected_parts(matrices, "nvfp4"))


@pytest.mark.parametrize("row", [0, 31])
@pytest.mark.parametrize("budget", [None, CUT[1], CUT[3]])
@pytest.mark.parametrize("number_format", ["nvfp4", "fp8-channel", "bf16"])
def test_a_weight_that_is_not_finite_is_named_in_every_piece(tmp_path, number_format, budget, row):
    """Also if nothing is quantized: gate and up are read as one slab of two tensors."""
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.{e}.{name}.weight": matrix
        for e, matrices in enumerate(matrices_of(E, 32, 48))
        for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), matrices, strict=True)
    }
    name = f"{prefix}.2.up_proj.weight"
    tensors[name][row, 7] = float("inf")
    write(tmp_path / "in", tensors, config_of("qwen3_moe", E, 32, 48, 1))
    plan = moe_ckpt.make_plan(tmp_path / "in", format=number_format)
    with pytest.raises(moe_ckpt.CheckpointError) as caught:
        execute(plan, tmp_path / "out", backend=backend_for("cpu"), budget=budget)
    assert f"{name}: weight is inf at row {row}, column 7;" in str(caught.value)


@pytest.mark.parametrize("where", [(0, 1, 5), (2, 40, 90), (1, 0, 0)])
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("as_", ["split", "fused"])
def test_a_weight_that_is_not_finite_is_named_where_it_is_stored(tmp_path, where, leaf, as_):
    family, form = next((f, o) for f, o in FORMS if f.name == "gpt_oss")
    make(tmp_path / "in", family, form, 48, 96, shards=1)
    tensors = load(tmp_path / "in")
    name = f"model.layers.1.mlp.experts.{leaf}"
    tensors[name][where] = float("nan")
    config = moe_ckpt.make_plan(tmp_path / "in").root / "config.json"
    text = config.read_bytes()
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    (tmp_path / "in").rmdir()
    write(tmp_path / "in", tensors, {})
    config.write_bytes(text)
    done = run_here("convert", tmp_path / "in", tmp_path / "out", "--experts", as_)
    assert done.returncode == 3
    expert, row, column = where
    assert f"{name}[expert {expert}]: weight is nan at row {row}, column {column};" in done.stderr
