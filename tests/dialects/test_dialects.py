"""Dialects: their choice, their names, their configuration files."""

from __future__ import annotations

import json

import pytest
from kit.assignments import all_linears, experts_only, mixed
from kit.files import FIXTURES

import moe_ckpt
from moe_ckpt.dialects import (
    DIALECTS,
    Assignment,
    QuantizedExperts,
    dialect_for,
    find_dialect,
    runtimes_of_spelling,
)
from moe_ckpt.dialects.compressed_tensors.table import SCHEMES
from moe_ckpt.dialects.matching import Built
from moe_ckpt.dialects.methods import METHODS
from moe_ckpt.dialects.modelopt.table import ALGORITHMS, MIX
from moe_ckpt.dialects.read import read_config
from moe_ckpt.errors import LayoutError, UsageError
from moe_ckpt.formats import FORMATS, find_format

CT = "compressed-tensors"
MODULE = Built("model.layers.0.self_attn.o_proj", ("model.layers.0.self_attn.o_proj",), None)
SIMPLE = Assignment(
    {"?": [QuantizedExperts("model.layers.0.mlp.experts", 0, 4, ("gate_proj", "up_proj"))]},
    {},
    ["model.layers.0.mlp.gate"],
    {},
)


def simple(format_name, kv_cache=False):
    experts = {format_name: SIMPLE.experts["?"]}
    return Assignment(experts, {}, SIMPLE.kept, {}, kv_cache)


def files(dialect, assignment, config=None):
    found = find_dialect(dialect).config_files(config or {"model_type": "x"}, assignment)
    return {name: json.loads(text) for name, text in found.items()}


def quantization(dialect, assignment):
    return files(dialect, assignment)["config.json"]["quantization_config"]


@pytest.mark.parametrize(
    ("formats", "dialect"),
    [
        (["nvfp4"], "modelopt"),
        (["nvfp4-w4a16"], "modelopt"),
        (["fp8-tensor"], "modelopt"),
        (["mxfp8"], "modelopt"),
        (["fp8-block"], "fp8"),
        (["fp8-channel"], CT),
        (["mxfp4"], CT),
        (["int4-g32"], CT),
        (["int8-channel"], CT),
        (["bf16"], "none"),
        (["nvfp4", "bf16"], "modelopt"),
        (["nvfp4", "fp8-tensor"], "modelopt"),
        (["nvfp4", "fp8-channel"], CT),
        (["fp8-tensor", "mxfp8"], CT),
        (["int4-g128", "fp8-block"], CT),
    ],
)
def test_defaults(formats, dialect):
    assert dialect_for(formats, None).name == dialect


@pytest.mark.parametrize(
    ("formats", "wanted", "words"),
    [
        (["nvfp4"], "awq", "unknown; choose modelopt, compressed-tensors, fp8, none"),
        (["fp8-channel"], "modelopt", "a scale for each row.*choose compressed-tensors"),
        (["fp8-block"], "modelopt", "a scale for each block.*choose compressed-tensors or fp8"),
        (["int4-g32"], "modelopt", "no such algorithm"),
        (["nvfp4", "fp8-block"], "modelopt", "a scale for each block"),
        (["fp8-tensor", "mxfp8"], "modelopt", "4-bit integers"),
        (["fp8-tensor"], "fp8", "128x128 blocks only"),
        (["fp8-block", "nvfp4"], "fp8", "it has no nvfp4.*choose compressed-tensors"),
        (["bf16"], "modelopt", "nothing is quantized; that is dialect none; choose none"),
        (["nvfp4"], "none", "it has no nvfp4"),
    ],
)
def test_refusals(formats, wanted, words):
    with pytest.raises(UsageError, match=words):
        dialect_for(formats, wanted)


def test_every_format_has_a_dialect_and_every_spelling_has_its_roles():
    for row in FORMATS:
        assert row.name in dialect_for([row.name]).spellings
        for dialect in DIALECTS:
            assert row.name not in {*dialect.spellings} & {*dialect.refused}
            if row.name in dialect.spellings:
                roles = {part.role for part in row.parts}
                assert set(dialect.spellings[row.name].suffixes) == roles, (dialect.name, row.name)


def test_runtimes():
    modelopt, ct = find_dialect("modelopt"), find_dialect(CT)
    assert runtimes_of_spelling(modelopt, ["nvfp4"], ["fp8-tensor"]) == (
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
    )
    assert runtimes_of_spelling(modelopt, ["nvfp4"], ["mxfp8"]) == (
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
    )
    every = ("vLLM", "SGLang", "transformers")
    assert runtimes_of_spelling(ct, ["int4-g32"], ["fp8-channel", "bf16"]) == every
    assert runtimes_of_spelling(ct, ["fp8-tensor", "bf16"], ["int4-g32"]) == every
    assert runtimes_of_spelling(ct, ["bf16"], ["fp8-tensor"]) == every
    assert runtimes_of_spelling(ct, ["int4-g32", "fp8-channel"]) == ("vLLM", "SGLang")
    # Packed experts beside experts that stay, or what transformers takes for them.
    assert runtimes_of_spelling(ct, ["int4-g32", "bf16"], ["fp8-channel"]) == ("vLLM", "SGLang")
    assert runtimes_of_spelling(ct, ["bf16"], ["int4-g32", "fp8-channel"]) == ("vLLM", "SGLang")


def test_tensor_names():
    ct = find_dialect(CT)
    assert ct.tensor_name("nvfp4", "e.0.up_proj", "input_scale", False) == (
        "e.0.up_proj.input_global_scale"
    )
    assert ct.spellings["nvfp4"].inverse == {"global_scale", "input_scale"}
    assert ct.spellings["int4-g32"].shape_suffix == "weight_shape"
    assert find_dialect("fp8").tensor_name("fp8-block", "m", "block_scale", False) == (
        "m.weight_scale_inv"
    )
    assert [d.scalar_shape for d in DIALECTS] == [(), (1,), (), ()]


FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
IGNORE = ["*.mlp.gate", "*lm_head", "lm_head", "model.layers.0.mlp.gate"]


@pytest.mark.parametrize(
    ("format_name", "algo", "group", "group_size"),
    [
        ("nvfp4", "NVFP4", {"input_activations": FP4, "weights": FP4}, 16),
        ("nvfp4-w4a16", "W4A16_NVFP4", {"weights": FP4}, 16),
        ("fp8-tensor", "FP8", {"input_activations": FP8, "weights": FP8}, None),
        ("mxfp8", "MXFP8", None, 32),
    ],
)
@pytest.mark.parametrize("kv_cache", [False, True])
def test_modelopt(format_name, algo, group, group_size, kv_cache):
    found = find_dialect("modelopt").config_files({"a": 1}, simple(format_name, kv_cache))
    producer = {"name": "modelopt", "version": "0.47.0"}
    flat = {"config_groups": {"group_0": group | {"targets": ["Linear"]}}} if group else {}
    flat |= {"ignore": IGNORE, "quant_algo": algo}
    flat |= {"kv_cache_scheme": FP8} if kv_cache else {}
    flat |= {"producer": producer, "quant_method": "modelopt"}
    nested = {"quant_algo": algo, "kv_cache_quant_algo": "FP8" if kv_cache else None}
    nested |= {"group_size": group_size} if group_size else {}
    nested |= {"exclude_modules": IGNORE}
    assert found == {
        "hf_quant_config.json": json.dumps({"producer": producer, "quantization": nested}, indent=2)
        + "\n",
        "config.json": json.dumps({"a": 1, "quantization_config": flat}, indent=2) + "\n",
    }


def test_modelopt_mix():
    """Experts by the name of their module, fused modules by their own and their members' names."""
    found = files("modelopt", mixed("nvfp4", "fp8-tensor"))
    flat, nested = (
        found["config.json"]["quantization_config"],
        found["hf_quant_config.json"]["quantization"],
    )
    table = flat["quantized_layers"]
    assert flat["quant_algo"] == nested["quant_algo"] == "MIXED_PRECISION"
    assert nested["quantized_layers"] == table
    assert nested["exclude_modules"] == flat["ignore"]
    assert table["model.layers.3.mlp.experts"] == {"quant_algo": "NVFP4", "group_size": 16}
    for leaf in ("q_proj", "qkv_proj", "o_proj"):
        assert table[f"model.layers.11.self_attn.{leaf}"] == {"quant_algo": "FP8"}
    assert not any(name in table for name in flat["ignore"])
    assert "model.layers.1.mlp.experts" in flat["ignore"]
    groups = flat["config_groups"].values()
    assert sorted(t for group in groups for t in group["targets"]) == sorted(table)


NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}
E8M0 = {"group_size": 32, "scale_dtype": "torch.uint8"}


def number(bits, kind, strategy, dynamic=False, **more):
    common = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True}
    return common | {"dynamic": dynamic} | more


@pytest.mark.parametrize(
    ("format_name", "stored", "weights", "activations"),
    [
        (
            "nvfp4",
            "nvfp4-pack-quantized",
            NVFP4 | {"dynamic": False},
            NVFP4 | {"dynamic": "local"},
        ),
        ("nvfp4-w4a16", "nvfp4-pack-quantized", NVFP4 | {"dynamic": False}, None),
        (
            "fp8-channel",
            "float-quantized",
            number(8, "float", "channel"),
            number(8, "float", "token", True),
        ),
        (
            "fp8-tensor",
            "float-quantized",
            number(8, "float", "tensor"),
            number(8, "float", "tensor"),
        ),
        (
            "fp8-block",
            "float-quantized",
            number(8, "float", "block", block_structure=[128, 128]),
            number(8, "float", "group", True, group_size=128),
        ),
        *(
            (
                f"mxfp{bits}",
                stored,
                number(bits, "float", "group", **E8M0),
                number(bits, "float", "group", True, **E8M0),
            )
            for bits, stored in ((4, "mxfp4-pack-quantized"), (8, "mxfp8-quantized"))
        ),
        ("int4-g64", "pack-quantized", number(4, "int", "group", group_size=64), None),
        (
            "int8-channel",
            "int-quantized",
            number(8, "int", "channel"),
            number(8, "int", "token", True),
        ),
    ],
)
def test_compressed_tensors(format_name, stored, weights, activations):
    assert quantization(CT, simple(format_name)) == {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [
            "lm_head",
            "model.layers.0.mlp.gate",
            r"re:(.*\.)?layers\.\d+\.mlp\.gate$",
            r"re:(.*\.)?lm_head$",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": stored,
                "output_activations": None,
                "weights": weights | {"observer": "minmax"},
                "input_activations": activations,
            }
        },
    }
    assert quantization(CT, simple(format_name, True))["kv_cache_scheme"] == number(
        8, "float", "tensor"
    )


def test_compressed_tensors_mix():
    found = quantization(CT, mixed("nvfp4", "fp8-channel", shared_format="fp8-channel"))
    assert found["format"] == "mixed-precision"
    experts, linears = found["config_groups"].values()
    assert experts["targets"] == [r"re:(.*\.)?experts\.\d+\.\w+$"]
    assert [group["format"] for group in (experts, linears)] == [
        "nvfp4-pack-quantized",
        "float-quantized",
    ]
    # transformers takes the group whose expressions have this word for that of routed experts
    assert not any("experts" in target for target in linears["targets"])
    # SGLang refuses experts in 4-bit integers otherwise
    assert quantization(CT, mixed("int4-g32", "fp8-channel"))["format"] == "pack-quantized"
    assert quantization(CT, mixed("fp8-channel", "int4-g32"))["format"] == "mixed-precision"


def test_fp8():
    assert quantization("fp8", simple("fp8-block")) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    assert find_dialect("fp8").kv_scales is None


@pytest.mark.parametrize(
    ("dialect", "format_name"),
    [("none", "bf16"), ("fp8", "fp8-block"), (CT, "nvfp4"), ("modelopt", "nvfp4")],
)
def test_the_sources_quantization_goes_from_every_level(dialect, format_name):
    old = {"quantization_config": {"quant_method": "old"}, "compression_config": {}}
    config = {"b": 1, **old, "text_config": {"y": 1, **old, "x": [{"z": 0}]}, "a": 2}
    found = files(dialect, simple(format_name), config)["config.json"]
    new = found.pop("quantization_config", None)
    assert (new is None) == (dialect == "none")
    assert list(found) == ["b", "text_config", "a"]
    assert list(found["text_config"]) == ["y", "x"]


@pytest.mark.parametrize("dialect", ["modelopt", CT, "fp8"])
def test_parts_of_a_fused_module_must_be_alike(dialect):
    format_name = "fp8-block" if dialect == "fp8" else "nvfp4"
    assignment = Assignment({}, {format_name: ["l.0.q_proj", "l.0.k_proj"]}, ["l.0.v_proj"], {})
    with pytest.raises(LayoutError, match=r"l\.0\.qkv_proj: runtimes build it as one module"):
        find_dialect(dialect).config_files({}, assignment)


ASSIGNMENTS = [
    *(experts_only(f) for f in ("nvfp4", "fp8-channel", "fp8-block", "int4-g32", "mxfp4")),
    all_linears("fp8-tensor"),
    mixed("nvfp4", "fp8-channel"),
    mixed("int4-g32", "fp8-channel"),
]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_the_library_and_transformers_parse_it(assignment):
    library = pytest.importorskip("compressed_tensors.quantization")
    transformers = pytest.importorskip("transformers")
    config = quantization(CT, assignment)
    parsed = library.QuantizationConfig.model_validate(config)
    assert len(parsed.config_groups) == len(assignment.formats)
    assert parsed.quantization_status == "compressed"
    found = transformers.utils.quantization_config.CompressedTensorsConfig(**config)
    assert found.is_quantization_compressed


def test_transformers_parses_fp8():
    transformers = pytest.importorskip("transformers")
    config = quantization("fp8", experts_only("fp8-block"))
    found = transformers.FineGrainedFP8Config.from_dict(config)
    assert found.weight_block_size == (128, 128) or found.weight_block_size == [128, 128]
    assert found.modules_to_not_convert == config["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("model", "experts", "words"),
    [
        ("llama4", "fused", "no names for experts in one tensor; choose --dialect modelopt"),
        ("gpt_oss", "fused", "no names for experts in one tensor; choose --dialect modelopt"),
        ("gpt_oss", "auto", "say --experts split"),
    ],
)
def test_experts_in_one_tensor_are_modelopts(model, experts, words):
    source = FIXTURES / model / "source"
    with pytest.raises(LayoutError, match=words):
        moe_ckpt.make_plan(source, dialect="compressed-tensors", experts=experts)
    split = moe_ckpt.make_plan(source, dialect="compressed-tensors", experts="split")
    assert split.experts_as == "split"
    assert moe_ckpt.make_plan(source, experts="fused").experts_as == "fused"


def test_every_method_spells_the_parts_of_its_formats():
    for method in METHODS.values():
        for spelling in method.spellings:
            parts = {part.role for part in find_format(spelling.format).parts}
            assert {*spelling.suffixes} == parts, (method.name, spelling.format)
            assert {*spelling.inverse, *spelling.scale_dtypes} <= parts
            assert not {*spelling.why_not} & {*spelling.runtimes}
            assert spelling.what
    for dialect in DIALECTS:
        written = [spelling for spelling in dialect.spellings.values() if spelling.what]
        assert all(spelling in METHODS[dialect.name].spellings for spelling in written)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.spelling.format)
def test_a_group_of_compressed_tensors_is_read_as_it_is_written(scheme):
    name = scheme.spelling.format
    group = {"targets": ["Linear"], "format": scheme.stored, "weights": scheme.weights}
    said = {
        "quant_method": CT,
        "config_groups": {"g": group | {"input_activations": scheme.inputs}},
    }
    reading = read_config(CT, said)
    assert not reading.problems
    assert reading.static == ({name} if find_format(name).input_scale else set())
    assert {read(MODULE) for read in reading.readers.values()} == {name}
    assert not METHODS[CT].source_problems(said)
    assert METHODS[CT].may_be(name, said)


@pytest.mark.parametrize(
    ("called", "size"), [("NVFP4", 16), ("FP8_PB_WO", 128), ("MXFP8", 32), ("MXFP4", 32)]
)
def test_the_group_size_beside_an_algorithm_is_no_finding(called, size):
    said = {"quant_method": "modelopt", "quant_algo": called, "ignore": [], "group_size": size}
    assert not read_config("modelopt", said).problems


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.names[0])
def test_an_algorithm_of_modelopt_is_read_by_its_names(algorithm):
    """With the group size that ModelOpt says beside it, and with no other."""
    name = algorithm.spelling.format
    for called in algorithm.names:
        said = {"quant_method": "modelopt", "quant_algo": called, "ignore": []}
        right, wrong = said | {"group_size": algorithm.group_size}, said | {"group_size": 99}
        reading = read_config("modelopt", right)
        assert not reading.problems
        assert {read(MODULE) for read in reading.readers.values()} == {name}
        assert "group_size is 99" in read_config("modelopt", wrong).problems[0]
        layers = {"quant_algo": MIX, "quantized_layers": {MODULE.name: {"quant_algo": called}}}
        assert read_config("modelopt", said | layers).layers == {MODULE.name: name}
        is_read = algorithm.spelling.is_source
        assert bool(METHODS["modelopt"].source_problems(said)) != is_read
