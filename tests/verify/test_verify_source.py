"""What a comparison with the source finds, in files that are changed and in files that are not."""

from __future__ import annotations

import json
import shutil
from math import inf

import pytest
import torch
from kit import stored_as as S  # noqa: N812
from kit.expert_layouts import config_of, matrices_of, pack, write
from kit.files import FIXTURES, read_json
from kit.stored_forms import CUT, FORMS, make
from kit.whole_plans import CASES
from safetensors.torch import load_file, save_file

import moe_ckpt
from moe_ckpt.dialects import DIALECTS, dialect_for
from moe_ckpt.engines import backend_for, with_torch
from moe_ckpt.errors import InputError, UsageError
from moe_ckpt.formats import find_format
from moe_ckpt.limits import Limits
from moe_ckpt.verify.findings import Findings
from moe_ckpt.verify.source.comparison import against_source
from moe_ckpt.verify.subject import open_subject

CPU = backend_for("cpu")
GOLDEN = sorted(FIXTURES.glob("*/modelopt-*"))
# Of normally distributed weights, a little less than of the fixtures.
LEAST_SNR_DB = {"nvfp4": 20, "nvfp4-w4a16": 20, "mxfp4": 15, "mxfp8": 31, "fp8-tensor": 31}
LEAST_SNR_DB |= {"fp8-block": 31, "fp8-channel": 32}


def compare(out, source, *, sample=None, backend=CPU, budget=None):
    findings = Findings()
    subject = open_subject(out, findings)
    against_source(subject, source, findings, sample, backend, Limits(workers=2), budget=budget)
    return findings


def as_theirs(out):
    """A conversion of ours without what says so; it is kept beside the folder."""
    (out / ".moe-ckpt").rename(out.with_name(f"{out.name}-private"))
    return out


def as_ours(out):
    """The same with it again."""
    out.with_name(f"{out.name}-private").rename(out / ".moe-ckpt")
    return out


def convert(source, out, **options):
    moe_ckpt.convert(source, out, device="cpu", **options)
    return out


def edit(folder, **changes):
    """Replace tensors of a folder, each by what a function makes of all; None removes it."""
    everything = {}
    for path in folder.glob("*.safetensors"):
        everything |= load_file(path)
    new = [name for name in changes if name not in everything]
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [*tensors, *new]:
            if name in changes:
                tensors[name] = changes[name](everything)
        new = []
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)


def flip(name, item=0, bit=0x40):
    """One bit of one byte of a tensor."""

    def changed(tensors):
        tensor = tensors[name].clone()
        tensor.view(-1).view(torch.uint8)[item] ^= bit
        return tensor

    return {name: changed}


def swap(one, two):
    """Two tensors."""
    return {one: lambda tensors: tensors[two], two: lambda tensors: tensors[one]}


def named(findings):
    return [finding.where for finding in findings.found]


@pytest.mark.parametrize(("model", "row", "quantize", "form"), CASES)
def test_our_conversions_are_clean(tmp_path, model, row, quantize, form):
    source = FIXTURES / model / "source"
    stats = [FIXTURES / model / "stats.json"] if row.input_scale else []
    written = 0
    for dialect in DIALECTS:
        try:
            dialect_for([row.name], dialect.name)
            out = tmp_path / dialect.name
            plan = moe_ckpt.convert(
                source,
                out,
                device="cpu",
                format=row.name,
                quantize=quantize,
                experts=form,
                dialect=dialect.name,
                stats=stats,
                max_shard_size="100KB",
            ).plan
        except (UsageError, InputError):
            continue
        written += 1
        findings = compare(out, source)
        assert findings.found == []
        assert all(difference.is_exact for difference in findings.differences)
        if row.name != "bf16":
            copies = sum(len(shard.copies) for shard in plan.shards)
            matrices = sum(len(job.outputs) * len(job.place.rows) for job in plan.jobs)
            assert findings.counts["copied tensors compared"] == copies > 5
            assert findings.counts["matrices compared"] == len(findings.differences) == matrices
    assert written


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_exports_of_modelopt_are_clean(folder):
    findings = compare(folder, folder.parent / "source")
    assert findings.found == []
    names = [difference.module for difference in findings.differences]
    assert len(set(names)) == len(names) >= 16
    for difference in findings.differences:
        assert difference.snr_db >= LEAST_SNR_DB[difference.format]
        if difference.format.startswith("nvfp4"):
            assert difference.is_exact


@pytest.mark.parametrize("form", ["hub", "source"])
def test_another_form_of_the_same_source_is_the_same(tmp_path, form):
    other = {"hub": "source", "source": "hub"}[form]
    out = convert(FIXTURES / "qwen3_moe" / form, tmp_path / "out", format="nvfp4-w4a16")
    assert compare(out, FIXTURES / "qwen3_moe" / other).is_clean


@pytest.mark.parametrize(("family", "form"), FORMS)
@pytest.mark.parametrize("square", [False, True])
def test_every_stored_form_is_paired(tmp_path, family, form, square):
    twice = sum(other.leaves == form.leaves for other in family.forms) > 1
    i, h = (48, 48) if square and not twice else (32, 48)
    make(tmp_path / "in", family, form, i, h)
    out = convert(tmp_path / "in", tmp_path / "out", experts="split")
    findings = compare(out, tmp_path / "in")
    assert findings.found == []
    assert all(difference.is_exact for difference in findings.differences)


@pytest.mark.parametrize(("family", "form"), [FORMS[0], *(f for f in FORMS if f[1].biases)])
@pytest.mark.parametrize("budget", CUT, ids=lambda budget: str(budget.stage_nbytes))
@pytest.mark.parametrize("as_", ["split", "fused"])
def test_nothing_depends_on_the_budget(tmp_path, family, form, budget, as_):
    if as_ == "fused" and not family.fused_runtimes:
        family, form = next((f, o) for f, o in FORMS if f.fused_runtimes)
    make(tmp_path / "in", family, form, 48, 32)
    out = convert(tmp_path / "in", tmp_path / "out", experts=as_)
    at_once = compare(out, tmp_path / "in")
    assert at_once.is_clean
    assert compare(out, tmp_path / "in", budget=budget) == at_once
    codes = next(n for n in names_of(out) if n.endswith((".0.up_proj.weight", ".gate_up_proj")))
    edit(out, **flip(codes, item=100))
    wrong = compare(out, tmp_path / "in", budget=budget)
    assert wrong == compare(out, tmp_path / "in")
    assert named(wrong) == [codes]


def names_of(folder):
    return sorted(name for path in folder.glob("*.safetensors") for name in load_file(path))


# What another tool may have got wrong: each takes the matrices of all experts, [gate, up, down].
def swap_gate_and_up(experts):
    experts[1][0], experts[1][1] = experts[1][1], experts[1][0]
    return ("1.gate_proj", "1.up_proj")


def swap_experts(experts):
    experts[0], experts[2] = experts[2], experts[0]
    return tuple(f"{e}.{name}" for e in (0, 2) for name in S.PROJECTIONS)


def transpose(experts):
    experts[2][2] = experts[2][2].T.contiguous()
    return ("2.down_proj",)


def shift_rows(experts):
    experts[0][1] = experts[0][1].roll(1, 0)
    return ("0.up_proj",)


def shift_columns(experts):
    experts[0][1] = experts[0][1].roll(1, 1)
    return ("0.up_proj",)


def lose_a_row(experts):
    experts[2][0] = experts[2][0].clone()
    experts[2][0][77] = 0
    return ("2.gate_proj",)


def change_one_weight(experts):
    matrix = experts[1][2] = experts[1][2].clone()
    row, column = divmod(int(matrix.abs().argmax()), matrix.shape[1])
    matrix[row, column] = matrix[row, column] / 4
    return ("1.down_proj",)


def change_sign(experts):
    experts[0][0] = -experts[0][0]
    return ("0.gate_proj",)


WRONG = [
    swap_gate_and_up,
    swap_experts,
    transpose,
    shift_rows,
    shift_columns,
    lose_a_row,
    change_one_weight,
    change_sign,
]
# Square and position-coded; 128 fits all formats.
COUNT, SIZE = 3, 128


def plain_source(folder):
    experts = [list(matrices) for matrices in matrices_of(COUNT, SIZE, SIZE)]
    fused = pack("fused", "concat", experts)
    names = (f"{S.QWEN}.gate_up_proj", f"{S.QWEN}.down_proj")
    tensors = dict(zip(names, fused, strict=True)) | beside()
    write(folder, tensors, config_of("qwen3_moe", COUNT, SIZE, SIZE, 1))
    return experts


def beside():
    return {
        "model.norm.weight": torch.arange(SIZE).bfloat16(),
        "model.embed_tokens.weight": matrices_of(1, SIZE, SIZE)[0][0],
        "model.layers.0.mlp.gate.weight": torch.eye(SIZE)[:COUNT].bfloat16(),
    }


def written_by_another(folder, experts, key, **config):
    encode, options, said, _ = S.ENCODINGS[key]
    tensors = beside()
    for e, matrices in enumerate(experts):
        for projection, matrix in zip(S.PROJECTIONS, matrices, strict=True):
            tensors |= encode(f"{S.QWEN}.{e}.{projection}.weight", matrix.float(), **options)[0]
    S.save(folder, tensors, said, count=COUNT, i=SIZE, h=SIZE, **config)


@pytest.mark.parametrize("key", S.ENCODINGS)
def test_what_others_write_is_within_the_bound(tmp_path, key):
    experts = plain_source(tmp_path / "in")
    written_by_another(tmp_path / "out", experts, key)
    findings = compare(tmp_path / "out", tmp_path / "in")
    assert findings.found == []
    assert len(findings.differences) == 3 * COUNT
    bits = find_format(findings.differences[0].format).weight_bits
    for difference in findings.differences:
        assert difference.snr_db > (30 if bits == 8 else 15)


@pytest.mark.parametrize("key", S.ENCODINGS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_of_others_are_found(tmp_path, key, wrong):
    experts = plain_source(tmp_path / "in")
    modules = wrong(experts)
    written_by_another(tmp_path / "out", experts, key)
    findings = compare(tmp_path / "out", tmp_path / "in")
    assert sorted(module_of(name) for name in named(findings)) == sorted(modules)
    for finding in findings.found:
        assert "the worst, at row" in finding.problem
        assert "SNR" in finding.problem


def module_of(name):
    return name.removeprefix(f"{S.QWEN}.").rpartition(".")[0]


SCALES = (
    *(f"weight{ending}" for ending in ("_scale", "_scale_2", "_global_scale", "_scale_inv")),
    *("scale", "qscale_weight"),
)


@pytest.mark.parametrize("key", S.ENCODINGS)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scale_that_is_off_by_two_is_found(tmp_path, key, factor):
    experts = plain_source(tmp_path / "in")
    written_by_another(tmp_path / "out", experts, key)
    module = f"{S.QWEN}.1.up_proj."
    scales = [n for n in names_of(tmp_path / "out") if n.removeprefix(module) in SCALES]
    assert scales
    for name in scales:
        shutil.copytree(tmp_path / "out", tmp_path / name)
        edit(tmp_path / name, **{name: lambda tensors, name=name: scaled(tensors[name], factor)})
        findings = compare(tmp_path / name, tmp_path / "in")
        assert [module_of(where) for where in named(findings)] == ["1.up_proj"]


def scaled(tensor, factor):
    """A scale, or one item of many, times a power of two."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    if tensor.element_size() == 1 and tensor.dtype != torch.float8_e4m3fn:
        flat.view(torch.uint8)[0] += 1 if factor > 1 else 255
    else:
        flat[0] = (flat[0].float() * factor).to(tensor.dtype)
    return tensor


@pytest.mark.parametrize("key", S.ENCODINGS)
def test_flipped_codes_of_others_are_found(tmp_path, key):
    """Those beyond the bound; the highest bit of each code is its sign, or half of the range."""
    experts = plain_source(tmp_path / "in")
    written_by_another(tmp_path / "out", experts, key)
    weight = f"{S.QWEN}.2.gate_proj.weight"
    name = next(n for n in names_of(tmp_path / "out") if n in (weight, f"{weight}_packed"))
    for item in (0, 5000, SIZE * SIZE // 2 - 1):
        shutil.copytree(tmp_path / "out", tmp_path / str(item))
        edit(tmp_path / str(item), **flip(name, item, 0xC0))
        findings = compare(tmp_path / str(item), tmp_path / "in")
        assert named(findings) == [name]


PARTS = ("weight", "weight_scale", "weight_scale_2")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bit", [1, 0x10])
def test_one_bit_of_ours_is_found(tmp_path, part, bit):
    source = FIXTURES / "qwen3_moe" / "source"
    out = convert(source, tmp_path / "out", format="nvfp4", quantize="linear")
    names = [
        f"model.layers.1.mlp.experts.7.up_proj.{part}",
        f"model.layers.0.self_attn.k_proj.{part}",
    ]
    for name in names:
        shutil.copytree(out, tmp_path / name)
        edit(tmp_path / name, **flip(name, item=2, bit=bit))
        findings = compare(tmp_path / name, source)
        assert named(findings) == [name]
        assert "should be" in findings.found[0].problem
        wrong = [d.module for d in findings.differences if not d.is_exact]
        assert wrong == [name.removesuffix(f".{part}")]


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"],
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_one_bit_of_what_is_copied_is_found(tmp_path, name, is_ours):
    source = FIXTURES / "qwen3_moe" / "source"
    out = convert(source, tmp_path / "out", format="nvfp4")
    edit(out if is_ours else as_theirs(out), **flip(name, item=9, bit=1))
    assert named(compare(out, source)) == [name]


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("model", ["qwen3_moe", "llama4", "gpt_oss"])
def test_wrong_tensors_of_conversions_are_found(tmp_path, model, is_ours):
    """Also of exports like ModelOpt's, split and stacked."""
    source = FIXTURES / model / "source"
    as_ = "split" if model == "qwen3_moe" else "fused"
    out = convert(source, tmp_path / "out", format="nvfp4", experts=as_)
    if not is_ours:
        as_theirs(out)
    tensors = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    if model == "qwen3_moe":
        one, two = (f"model.layers.0.mlp.experts.3.{p}_proj.weight" for p in ("gate", "up"))
        three = one.replace("experts.3", "experts.4")
        cases = [swap(one, two), swap(one, three), swap(f"{one}_scale", f"{two}_scale")]
        expected = [{one, two}, {one, three}, {one, two}]
    else:
        (one, two, *_) = (n for n in tensors if n.endswith("experts.gate_up_proj"))
        order = torch.tensor([1, 0, 2, 3])
        cases = [swap(one, two), {one: lambda tensors: tensors[one][order]}]
        cases += [{one: lambda tensors: tensors[one].roll(1, -1)}]
        cases += [{one: lambda tensors: tensors[one].roll(1, 1)}]
        expected = [{one, two}, {one}, {one}, {one}]
    for number, (changes, wanted) in enumerate(zip(cases, expected, strict=True)):
        copy = tmp_path / str(number)
        shutil.copytree(out, copy)
        edit(copy, **changes)
        found = {
            where.partition("[")[0].removesuffix("_scale") for where in named(compare(copy, source))
        }
        assert found == wanted


def test_the_scale_of_stacked_experts_is_that_of_the_largest(tmp_path):
    """Codes and scales of another global scale agree with each other, and are not the best."""
    source = FIXTURES / "llama4" / "source"
    out = convert(
        source,
        tmp_path / "out",
        format="fp8-tensor",
        experts="fused",
        missing_stats="constant",
        stats=[FIXTURES / "llama4" / "stats.json"],
    )
    name = next(n for n in names_of(out) if n.endswith("experts.down_proj"))
    weights = {}
    for path in source.glob("*.safetensors"):
        weights |= load_file(path)
    scale = weights[name].float().abs().max() / 448 * 2
    edit(
        out,
        **{
            name: lambda _: (weights[name].float() / scale).to(torch.float8_e4m3fn),
            f"{name}_weight_scale": lambda _: scale,
        },
    )
    assert named(compare(out, source)) == [f"{name}_weight_scale"]


@pytest.mark.parametrize("key", S.ENCODINGS)
@pytest.mark.parametrize(
    ("target", "quantize"), [("bf16", "linear"), ("nvfp4", "linear"), ("fp8-channel", "experts")]
)
def test_quantized_sources(tmp_path, key, target, quantize):
    encode, options, said, _ = S.ENCODINGS[key]
    shared = {"shared_amax": True} if encode is S.nvfp4 else {}
    tensors, _ = S.experts(encode, 3, 128, 256, **options, **shared)
    for name in ("q_proj", "o_proj"):
        tensors |= S.linear(encode, f"model.layers.0.self_attn.{name}", 256, 256, **options)[0]
    tensors |= {"model.norm.weight": torch.ones(256), "lm_head.weight": torch.randn(64, 256)}
    S.save(tmp_path / "in", tensors, said, count=3, i=128, h=256, shards=2)
    try:
        out = convert(
            tmp_path / "in",
            tmp_path / "out",
            format=target,
            quantize=quantize,
            allow_requantize=True,
        )
    except InputError:
        pytest.skip("there is no such conversion")
    findings = compare(out, tmp_path / "in")
    assert findings.found == []
    assert all(difference.is_exact for difference in findings.differences)
    assert findings.counts["matrices compared"] == 11
    assert compare(as_theirs(out), tmp_path / "in").found == []

    codes = [n for n in names_of(out) if n.startswith(f"{S.QWEN}.2.up_proj.weight")]
    name = next(n for n in codes if n.endswith(("weight", "weight_packed")))
    edit(out, **flip(name, item=1001, bit=0xC0))
    assert named(compare(out, tmp_path / "in")) == [name]
    assert named(compare(as_ours(out), tmp_path / "in")) == [name]


@pytest.mark.parametrize("target", ["bf16", "nvfp4", "fp8-tensor", "mxfp8"])
@pytest.mark.parametrize("as_", ["split", "fused"])
def test_gpt_oss_as_it_is_released(tmp_path, target, as_):
    tensors, _ = S.fused(S.mxfp4, 3, 64, 64, interleaved=True, blocks=True)
    for leaf, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        tensors[f"{S.QWEN}.{leaf}_bias"] = torch.randn(3, rows).bfloat16()
    sizes = {"num_local_experts": 3, "intermediate_size": 64}
    S.save(tmp_path / "in", tensors, S.MXFP4, count=3, i=64, h=64, model_type="gpt_oss", **sizes)
    stats = tmp_path / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    options = {"stats": [stats], "missing_stats": "constant"} if target == "fp8-tensor" else {}
    try:
        out = convert(tmp_path / "in", tmp_path / "out", format=target, experts=as_, **options)
    except InputError:
        pytest.skip("there is no such conversion")
    findings = compare(out, tmp_path / "in")
    assert findings.found == []
    assert all(difference.is_exact for difference in findings.differences)
    if target == "nvfp4":
        assert {difference.snr_db for difference in findings.differences} == {inf}
    name = next(n for n in names_of(out) if n.endswith((".1.up_proj.weight", ".gate_up_proj")))
    edit(out, **flip(name, item=70, bit=0x40))
    assert named(compare(out, tmp_path / "in")) == [name]


def test_experts_of_a_bf16_source_in_blocks(tmp_path):
    """The released form, of a model that is stored the other way up in the source."""
    experts = [list(matrices) for matrices in matrices_of(3, 64, 64)]
    gate_up, down = pack("fused-transposed", "interleaved", experts)
    names = (f"{S.QWEN}.gate_up_proj", f"{S.QWEN}.down_proj")
    sizes = {"num_local_experts": 3, "intermediate_size": 64}
    config = config_of("gpt_oss", 3, 64, 64, 1) | sizes
    biases = {f"{names[0]}_bias": torch.randn(3, 128), f"{names[1]}_bias": torch.randn(3, 64)}
    write(tmp_path / "in", dict(zip(names, (gate_up, down), strict=True)) | biases, config)
    tensors = dict(biases)
    for name, stacked in zip(names, (gate_up, down), strict=True):
        weight = stacked.swapaxes(1, 2).float().contiguous()
        tensors |= S.mxfp4(name, weight, blocks=True)[0]
    S.save(tmp_path / "out", tensors, S.MXFP4, count=3, i=64, h=64, model_type="gpt_oss", **sizes)
    findings = compare(tmp_path / "out", tmp_path / "in")
    assert findings.found == []
    assert len(findings.differences) == 9
    # of expert 1, row 65, where the rows of gate and up alternate
    edit(tmp_path / "out", **flip(f"{names[0]}_blocks", (128 + 65) * 32 + 7, 0xC0))
    findings = compare(tmp_path / "out", tmp_path / "in")
    assert named(findings) == [f"{S.QWEN}.1.up_proj.weight"]
    assert "at row 32, column" in findings.found[0].problem


@pytest.mark.parametrize("is_ours", [True, False])
def test_what_is_missing_and_what_is_too_many(tmp_path, is_ours):
    source = FIXTURES / "qwen3_moe" / "source"
    out = convert(source, tmp_path / "out", format="nvfp4")
    if not is_ours:
        as_theirs(out)
    expert = "model.layers.1.mlp.experts.5.up_proj"
    gone = [n for n in names_of(out) if n.startswith(f"{expert}.")] + ["model.norm.weight"]
    new = ["model.layers.1.mlp.experts.8.up_proj.weight", "model.layers.0.extra"]
    changes = {name: lambda _: None for name in gone}
    edit(out, **changes, **{name: lambda _: torch.ones(3) for name in new})
    findings = compare(out, source)
    assert sorted(named(findings)) == sorted([f"{expert}.weight", "model.norm.weight", *new])
    problems = {finding.where: finding.problem for finding in findings.found}
    assert all(problems[name].startswith("is not in the source") for name in new)
    assert problems[f"{expert}.weight"] == "is missing"


def test_another_dtype_and_another_shape(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    out = convert(source, tmp_path / "out", format="nvfp4")
    names = ["model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight"]
    edit(
        out,
        **{
            names[0]: lambda tensors: tensors[names[0]].float(),
            names[1]: lambda tensors: tensors[names[1]][:-1],
            names[2]: lambda tensors: tensors[names[2]].T,
        },
    )
    findings = compare(out, source)
    assert sorted(named(findings)) == sorted(names)
    assert "F32" in next(f.problem for f in findings.found if f.where == names[0])


@pytest.mark.parametrize("other", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe_wide"])
def test_another_model_is_a_finding_and_no_crash(tmp_path, other):
    out = convert(FIXTURES / "qwen3_moe" / "source", tmp_path / "out", format="nvfp4")
    findings = compare(out, FIXTURES / other / "source")
    assert any("experts" in where for where in named(findings))
    assert "config.json: model_type" in named(findings) or other == "qwen3_moe_wide"


def test_a_layer_that_stays_is_compared_too(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[rule]]\nmatch = "*.layers.0.mlp.experts.*"\nformat = "keep"\n'
        '[[rule]]\nmatch = "*.experts.*"\nformat = "nvfp4"\n'
        '[[rule]]\nmatch = "*.self_attn.*"\nformat = "fp8-tensor"\n'
    )
    stats = [FIXTURES / "qwen3_moe" / "stats.json"]
    out = convert(source, tmp_path / "out", recipe=recipe, stats=stats)
    findings = compare(out, source)
    assert findings.found == []
    assert all(difference.is_exact for difference in findings.differences)
    assert {difference.format for difference in findings.differences} == {"nvfp4", "fp8-tensor"}
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    edit(as_theirs(out), **flip(name, item=11, bit=1))
    assert named(compare(out, source)) == [name]


def test_scales_of_the_kv_cache_need_no_source(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    stats = read_json(FIXTURES / "qwen3_moe" / "stats.json")
    for name, module in stats["modules"].items():
        if name.endswith(("k_proj", "v_proj")):
            module["output_amax"] = 3.0
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    out = convert(source, tmp_path / "out", stats=[tmp_path / "stats.json"], kv_cache="fp8")
    assert any(name.endswith("k_scale") for name in names_of(out))
    assert compare(out, source).is_clean
    assert compare(as_theirs(out), source).is_clean


@pytest.mark.parametrize("is_ours", [True, False])
def test_the_rest_of_the_folder(tmp_path, is_ours):
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "qwen3_moe" / "source", source)
    (source / "tokenizer.json").write_text('{"version": "1.0", "b": [1, 2]}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("what it is")
    out = convert(source, tmp_path / "out", format="nvfp4")
    if not is_ours:
        as_theirs(out)
    assert compare(out, source).is_clean

    def change(name, text):
        assert (out / name).read_text() != text
        (out / name).write_text(text)

    change("tokenizer.json", '{ "version": "1.0", "b": [1, 2]}')
    change("README.md", "what it became")
    assert named(compare(out, source)) == (["README.md", "tokenizer.json"] if is_ours else [])
    change("tokenizer.json", '{"version": "1.0", "b": [1, 3]}')
    (out / "chat_template.jinja").unlink()
    (out / "README.md").unlink()
    wrong = ["chat_template.jinja", "tokenizer.json"]
    assert named(compare(out, source)) == (["README.md", *wrong] if is_ours else wrong)

    config = read_json(out / "config.json")
    config["rope_theta"] = 1
    config["num_attention_heads"] *= 2
    config["new"] = True
    del config["rms_norm_eps"]
    (out / "config.json").write_text(json.dumps(config))
    keys = {where for where in named(compare(out, source)) if where.startswith("config.json")}
    expected = {"num_attention_heads", "rms_norm_eps"} | ({"new"} if is_ours else set())
    if "rope_theta" in read_json(source / "config.json") or is_ours:
        expected.add("rope_theta")
    assert keys == {f"config.json: {key}" for key in expected}


def test_a_sample_has_the_first_and_the_last(tmp_path):
    source = FIXTURES / "qwen3_moe" / "source"
    out = convert(source, tmp_path / "out", format="nvfp4")
    every = compare(out, source).differences
    for count, slabs in ((1, 2), (2, 2), (5, 5), (64, 32)):
        findings = compare(out, source, sample=count)
        assert findings.counts["copied tensors compared"] == min(slabs, 21)
        found = findings.differences
        assert found[0] == every[0]
        assert found[-1] == every[-1]
        assert len({(d.module.rpartition(".")[0], "down" in d.module) for d in found}) == slabs
    assert compare(out, source, sample=5) == compare(out, source, sample=5)
    edit(out, **flip("model.layers.0.mlp.experts.1.up_proj.weight"))
    assert compare(out, source, sample=2).is_clean
    assert not compare(out, source, sample=64).is_clean


@pytest.mark.parametrize("model", ["qwen3_moe", "llama4"])
@pytest.mark.parametrize("number_format", ["nvfp4", "fp8-tensor"])
def test_all_engines_find_the_same(tmp_path, model, number_format):
    source = FIXTURES / model / "source"
    theirs = FIXTURES / model / f"modelopt-{number_format.removesuffix('-tensor')}"
    out = convert(
        source, tmp_path / "out", format=number_format, stats=[FIXTURES / model / "stats.json"]
    )
    name = next(n for n in names_of(out) if n.endswith(("gate_proj.weight", "gate_up_proj")))
    edit(out, **flip(name, item=7))
    for folder in (out, theirs):
        found = [compare(folder, source, backend=b) for b in (CPU, with_torch.backend("cpu"))]
        assert found[0] == found[1]
    assert not compare(out, source).is_clean


def test_weights_that_are_no_numbers_are_findings(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "qwen3_moe" / "source", source)
    out = convert(source, tmp_path / "out", format="nvfp4")
    fused = "model.layers.0.mlp.experts.down_proj"
    edit(source, **{fused: lambda tensors: put(tensors[fused], 5, float("nan"))})
    scale = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    edit(out, **{scale: lambda tensors: put(tensors[scale], 3, float("nan"))})
    found = {finding.where: finding.problem for finding in compare(out, source).found}
    assert set(found) == {
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
    }
    for problem in found.values():
        assert "nan" in problem


def put(tensor, item, value):
    tensor = tensor.clone()
    tensor.view(-1)[item] = value
    return tensor


def test_a_layout_that_was_given_is_given_again(tmp_path):
    """Square experts of a type that no table has."""
    experts = matrices_of(3, 32, 32)
    names = (f"{S.QWEN}.gate_up_proj", f"{S.QWEN}.down_proj")
    stored = pack("fused-transposed", "interleaved", experts)
    write(tmp_path / "in", dict(zip(names, stored, strict=True)), config_of("new", 3, 32, 32, 1))
    given = {"layout": "fused-transposed", "gate_up_order": "interleaved"}
    out = convert(tmp_path / "in", tmp_path / "out", **given)
    findings = compare(out, tmp_path / "in")
    assert findings.found == []
    assert all(difference.is_exact for difference in findings.differences)
