"""transformers loads what we write, and computes with the weights that we mean.

The reference is the same folder decoded by us, loaded as a plain model. transformers decodes on
its own, with compressed-tensors or without, so equal weights mean that names, shapes, scales and
configuration say the same to it. That the reference is right, the original's weights show.
"""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from kit.tiny_models import CONFIGS, distance, load, logits, save, weights
from safetensors.torch import load_file, save_file

import moe_ckpt
from moe_ckpt.dialects import DIALECTS
from moe_ckpt.formats import find_format

pytestmark = pytest.mark.filterwarnings("ignore")

CT = "compressed-tensors"
# How far decoded matrices are from the original's, at least and at most.
ERRORS = {
    **dict.fromkeys(("fp8-block", "fp8-channel", "fp8-tensor", "mxfp8"), (0.02, 0.05)),
    "int8-channel": (0.005, 0.05),
    **dict.fromkeys(("int4-g32", "int4-g64", "int4-g128", "mxfp4", "nvfp4"), (0.07, 0.25)),
}
# transformers keeps the scales of linear layers that it does not decode at once in bf16: what it
# makes of them is rounded three times, and ours once.
BF16_SCALE = 2.0**-7


@pytest.fixture(scope="module", autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model type -> (folder, statistics, its weights, its logits)."""

    @cache
    def get(model_type):
        source, stats = save(model_type, tmp_path_factory.mktemp(model_type))
        return source, stats, *reference(source)

    return get


@pytest.fixture(scope="module")
def converted(saved, tmp_path_factory):
    """What `convert` gives, once for each way."""

    @cache
    def get(model_type, format_name, quantize, dialect=None):
        folder = tmp_path_factory.mktemp("converted")
        how = {"format": format_name, "quantize": quantize, "dialect": dialect}
        return convert(saved, model_type, folder, [format_name], **how)

    return get


def convert(saved, model_type, folder, formats, **how):
    """The output, its plan, and the weights and logits of the same decoded to bf16."""
    source, stats, *_ = saved(model_type)
    if any(find_format(name).input_scale for name in formats):
        how["stats"] = [stats]
    result = moe_ckpt.convert(source, folder / "out", **how)
    moe_ckpt.convert(folder / "out", folder / "decoded", format="bf16")
    return folder / "out", result.plan, *reference(folder / "decoded")


def reference(folder):
    model, info = load(folder)
    assert not info
    return weights(model), logits(model)


def differ(found, want, tolerance=0.0):
    """The weights that are not the reference's."""
    return [
        name
        for name, weight in want.items()
        if name not in found
        or found[name].shape != weight.shape
        or not alike(found[name], weight, tolerance)
    ]


def alike(found, want, tolerance):
    if not tolerance:
        return torch.equal(found.to(want.dtype), want)
    return torch.allclose(found.float(), want.float(), rtol=tolerance, atol=0)


def is_experts(name):
    return ".experts." in name


def check_near_original(saved, model_type, decoded, format_name, quantize):
    """Decoded matrices are the original's but for the format's error; others are the same."""
    original = saved(model_type)[2]
    assert decoded.keys() == original.keys()
    low, high = ERRORS[format_name]
    quantized = 0
    for name, weight in original.items():
        found = decoded[name]
        linear = name.endswith(("_proj.weight", "_mqa.weight")) and quantize == "linear"
        if not (is_experts(name) or linear):
            assert torch.equal(found, weight), name
            continue
        quantized += 1
        shape = (-1, *weight.shape[-2:])
        for one, other in zip(found.view(shape), weight.view(shape), strict=True):
            assert low <= distance(one, other) <= high, name
    assert quantized >= 2


def check_loaded(saved, made, model_type, format_name, quantize):
    out, plan, want, of_reference = made
    assert "transformers" in plan.runtimes
    check_near_original(saved, model_type, want, format_name, quantize)
    most = 1 if find_format(format_name).weight_bits == 4 else 0.5
    assert 0.003 < distance(of_reference, saved(model_type)[3]) < most

    model, info = load(out)
    check_info(info, format_name)
    found = logits(model)
    if plan.dialect == CT and quantize == "linear":
        # The activations are quantized, too.
        loaded = weights(model)
        assert not differ(loaded, want, BF16_SCALE)
        assert not [name for name in differ(loaded, want) if is_experts(name)]
        model, info = load(out, dequantize=True)
        check_info(info, format_name)
        found = logits(model)
    assert not differ(weights(model), want)
    assert torch.equal(found, of_reference)


def check_info(info, format_name):
    """Nothing but activation scales is unknown: transformers has no place for the experts'."""
    unknown = info.pop("unexpected_keys", [])
    assert not info
    assert all(name.endswith(".input_scale") for name in unknown)
    assert not unknown or format_name == "fp8-tensor"


@pytest.mark.parametrize("quantize", ["experts", "linear"])
@pytest.mark.parametrize("format_name", ["fp8-block", "fp8-channel", "fp8-tensor", "int4-g32"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_quantized_models_load(saved, converted, model_type, format_name, quantize):
    dialect = "fp8" if format_name == "fp8-block" else CT
    made = converted(model_type, format_name, quantize, dialect)
    check_loaded(saved, made, model_type, format_name, quantize)


@pytest.mark.parametrize("quantize", ["experts", "linear"])
@pytest.mark.parametrize("format_name", ["int4-g64", "int4-g128", "mxfp4"])
def test_other_formats_load(saved, converted, format_name, quantize):
    made = converted("qwen3_moe", format_name, quantize, CT)
    check_loaded(saved, made, "qwen3_moe", format_name, quantize)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_split_experts_load(saved, tmp_path, model_type):
    source, _, want, of_original = saved(model_type)
    plan = moe_ckpt.convert(source, tmp_path / "out", format="bf16").plan
    assert "transformers" in plan.runtimes
    found, of_found = reference(tmp_path / "out")
    assert not differ(found, want)
    assert torch.equal(of_found, of_original)


SPELLED = [(d.name, name) for d in DIALECTS for name in d.spellings if name != "bf16"]


@pytest.mark.parametrize(("dialect", "format_name"), SPELLED)
def test_runtimes_say_what_transformers_reads(converted, dialect, format_name):
    """What is not said to load does not, or with other weights and a warning at most."""
    out, plan, want, _ = converted("qwen3_moe", format_name, "experts", dialect)
    assert ("transformers" in plan.runtimes) == loads(out, want)


def loads(out, want, tolerance=0.0):
    """Whether a model loads, all its weights those of the reference."""
    try:
        model, info = load(out)
        logits(model)
    except (RuntimeError, ValueError, KeyError, NotImplementedError):
        return False
    lacks = info.keys() - {"unexpected_keys"}
    return not lacks and not differ(weights(model), want, tolerance)


EXPERTS, ATTENTION = "*.experts.[0-9]*", "*.self_attn.*"
FIRST = ("model.layers.0.*", "keep")
FIRST_EXPERTS = ("model.layers.0.*experts*", "keep")
# Rules, and whether transformers reads the result.
MIXES = {
    "int4 experts, fp8 attention": ([(EXPERTS, "int4-g32"), (ATTENTION, "fp8-channel")], True),
    "fp8 experts, int4 attention": ([(EXPERTS, "fp8-channel"), (ATTENTION, "int4-g32")], True),
    "mxfp4 experts, fp8 attention": ([(EXPERTS, "mxfp4"), (ATTENTION, "fp8-channel")], True),
    "two formats of attention": (
        [(EXPERTS, "int4-g32"), ("*.0.self_attn*", "fp8-channel"), (ATTENTION, "int4-g64")],
        True,
    ),
    "fp8 but the first layer": ([FIRST, ("*", "fp8-channel")], True),
    "fp8 blocks but the first layer": ([FIRST, ("*", "fp8-block")], True),
    "fp8 attention only": ([(ATTENTION, "fp8-channel")], True),
    # Packed experts, or what transformers takes for them, beside experts that are not.
    "int4 but the first layer": ([FIRST, ("*", "int4-g32")], False),
    "int4 but the first experts": ([FIRST_EXPERTS, ("*", "int4-g32")], False),
    "mxfp4 but the first layer": ([FIRST, ("*", "mxfp4")], False),
    "int4 attention only": ([(ATTENTION, "int4-g32")], False),
    "two formats of experts": (
        [(f"*.0.mlp.{EXPERTS[2:]}", "int4-g32"), ("*", "fp8-channel")],
        False,
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_mixes(saved, tmp_path, name):
    rules, expected = MIXES[name]
    out, plan, want, _ = convert_by(saved, "qwen3_moe", tmp_path, rules)
    assert ("transformers" in plan.runtimes) == expected
    assert loads(out, want, BF16_SCALE) == expected


def test_a_mix_with_shared_experts(saved, tmp_path):
    """Shared experts in a group of their own, which is not taken for that of the experts."""
    rules = [("*shared_experts*", "fp8-channel"), (EXPERTS, "int4-g32"), ("*", "fp8-channel")]
    out, plan, want, of_reference = convert_by(saved, "deepseek_v3", tmp_path, rules)
    assert "transformers" in plan.runtimes
    assert loads(out, want, BF16_SCALE)
    model, info = load(out, dequantize=True)
    assert not info
    assert not differ(weights(model), want)
    assert torch.equal(logits(model), of_reference)


def convert_by(saved, model_type, folder, rules):
    recipe = folder / "recipe.toml"
    recipe.write_text(
        "".join(f"[[rule]]\nmatch = {json.dumps(m)}\nformat = {json.dumps(f)}\n" for m, f in rules)
    )
    return convert(saved, model_type, folder, [f for _, f in rules if f != "keep"], recipe=recipe)


LAYER = "model.layers.1.mlp.experts.2"


def swap(tensors, suffixes):
    for suffix in suffixes:
        gate, up = f"{LAYER}.gate_proj.{suffix}", f"{LAYER}.up_proj.{suffix}"
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def double(name):
    def change(tensors, suffixes):
        tensors[f"{name}.{suffixes[-1]}"].mul_(2)

    return change


@pytest.mark.parametrize(
    "change", [swap, double(f"{LAYER}.down_proj"), double("model.layers.0.self_attn.o_proj")]
)
@pytest.mark.parametrize(
    ("format_name", "suffixes"),
    [
        ("fp8-block", ("weight", "weight_scale_inv")),
        ("fp8-channel", ("weight", "weight_scale")),
        ("int4-g32", ("weight_packed", "weight_scale")),
    ],
)
def test_what_is_wrong_is_seen(converted, tmp_path, format_name, suffixes, change):
    """One expert's gate and up exchanged, or one scale doubled, makes another model."""
    dialect = "fp8" if format_name == "fp8-block" else CT
    out, _, want, of_reference = converted("qwen3_moe", format_name, "linear", dialect)
    shutil.copytree(out, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors, suffixes)
    save_file(tensors, file, {"format": "pt"})
    model, info = load(file.parent, dequantize=True)
    assert not info
    assert len(differ(weights(model), want, 0.1)) == 1
    assert not torch.equal(logits(model), of_reference)


@pytest.mark.parametrize("format_name", [name for d, name in SPELLED if d == CT])
def test_compressed_tensors_decodes_the_same(converted, format_name):
    """Every module by the library's compressor, with the scheme that our config gives it."""
    out, *_ = converted("deepseek_v3", format_name, "linear", CT)
    decoded = load_file(out.parent / "decoded" / "model.safetensors")
    given = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(given)
    modules: dict[str, dict] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    quantized = 0
    for module, state in modules.items():
        scheme = scheme_of(module, config)
        if scheme is None or not module.endswith(("_proj", "_mqa")):
            assert all(torch.equal(t, decoded[f"{module}.{leaf}"]) for leaf, t in state.items())
            continue
        quantized += 1
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found = compressor.decompress(state, scheme)["weight"].to(torch.bfloat16)
        assert torch.equal(found, decoded[f"{module}.weight"]), module
    assert quantized == 2 * 5 + 3 + 3 + 4 * 3  # attention, dense, shared, and routed experts


def scheme_of(module, config):
    linear = torch.nn.Linear(1, 1, device="meta")
    return next(
        (
            group
            for group in config.config_groups.values()
            if is_match(module, linear, group.targets, config.ignore)
        ),
        None,
    )
