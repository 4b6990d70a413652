"""What each runtime reads out of the lists of compressed-tensors, fp8 and ModelOpt's mixes.

The rules are re-implemented; where the library itself is at hand, it is asked, too.
"""

from __future__ import annotations

import json

import pytest
from kit.assignments import LAYERS, SET_ASIDE, all_linears, experts, experts_only, mixed, routers

from moe_ckpt.dialects import Assignment, find_dialect
from moe_ckpt.dialects.compressed_tensors.match import compressed_readers, fits
from moe_ckpt.dialects.fp8.match import fp8_readers
from moe_ckpt.dialects.matching import Built, UndecidedError, built_of
from moe_ckpt.dialects.modelopt.match import mixed_readers
from moe_ckpt.errors import LayoutError

CT = "compressed-tensors"
REFUSES = "refuses"


def linear(name, *members):
    return Built(name, members or (name,), None)


def routed(name, *projections):
    members = tuple(f"{name}.0.{p}" for p in projections or ("gate_proj", "up_proj", "down_proj"))
    return Built(name, members, None, is_experts=True)


QKV = linear("l.1.attn.qkv_proj", *(f"l.1.attn.{p}_proj" for p in "qkv"))
EXPERTS = routed("l.1.mlp.experts")
W123 = routed("l.1.mlp.experts", "w1", "w3", "w2")


def read(readers, module):
    found = []
    for reader in readers.values():
        try:
            found.append(reader(module))
        except UndecidedError:
            found.append(REFUSES)
    return found


@pytest.mark.parametrize(
    ("ignore", "targets", "module", "found"),
    # in vLLM, SGLang, transformers, TensorRT-LLM
    [
        ([], {"Linear": "a"}, linear("l.1.mlp.gate"), ["a", "a", "a", "a"]),
        (["l.1.mlp.gate"], {"Linear": "a"}, linear("l.1.mlp.gate"), [None] * 4),
        # the end of a name is enough for SGLang alone
        (["mlp.gate"], {"Linear": "a"}, linear("l.1.mlp.gate"), ["a", None, "a", "a"]),
        # parents do nothing, except in TensorRT-LLM
        (["l.1.mlp"], {"Linear": "a"}, linear("l.1.mlp.gate"), ["a", "a", "a", None]),
        # without $ an expression means longer names, too
        (["re:.*mlp.gate"], {"Linear": "a"}, linear("l.1.mlp.gate_b"), [None, None, None, "a"]),
        (["re:.*mlp.gate$"], {"Linear": "a"}, linear("l.1.mlp.gate_b"), ["a", "a", "a", "a"]),
        # the output head is no linear layer to vLLM and SGLang, but to transformers
        ([], {"Linear": "a"}, linear("lm_head"), [None, None, "a", "a"]),
        # fused modules: by members; some but not all
        (list(QKV.members), {"Linear": "a"}, QKV, [None, REFUSES, None, None]),
        ([r"re:.*attn\..*"], {"Linear": "a"}, QKV, [None] * 4),
        (list(QKV.members[:2]), {"Linear": "a"}, QKV, [REFUSES, REFUSES, REFUSES, None]),
        # experts go by the names of matrices of the first
        ([r"re:l\.1\.mlp\.experts\..*"], {"Linear": "a"}, EXPERTS, [None, None, None, "a"]),
        # SGLang asks for gate_proj even where it is called w1
        ([], {r"re:.*\.w[123]$": "a", "re:x": "b"}, W123, ["a", REFUSES, "a", "a"]),
        ([], {r"re:.*experts\.\d+\.\w+$": "a", "re:x": "b"}, W123, ["a"] * 4),
        # what no target fits: not quantized, but SGLang refuses it
        ([], {"re:x": "a", "re:y": "b"}, linear("l.1.o"), [None, REFUSES, None, None]),
        # of two, the first; or the first in order of the alphabet
        ([], {"re:l.*": "a", "re:.*o$": "b"}, linear("l.1.o"), ["a", "a", "b", "b"]),
        # before the members of a fused module SGLang looks at the class
        (
            [],
            {"Linear": "a", "re:.*[qkv]_proj$": "b"},
            linear("l.1.attn.qkv", *QKV.members),
            ["b", "a", "b", "b"],
        ),
    ],
)
def test_compressed_tensors(ignore, targets, module, found):
    assert read(compressed_readers(ignore, targets), module) == found


@pytest.mark.parametrize(
    ("entries", "module", "found"),
    # in vLLM, SGLang, transformers, TensorRT-LLM
    [
        (["model.layers.1.mlp.gate"], linear("model.layers.1.mlp.gate"), [None] * 4),
        (["model.layers.1.mlp.gate"], linear("model.layers.1.mlp.gate_proj"), ["f"] * 4),
        (["model.layers.1.mlp.gate"], linear("model.layers.11.mlp.gate"), ["f"] * 4),
        # vLLM knows neither parents nor patterns, and transformers stops at one that is none
        (["model.layers.1"], linear("model.layers.1.mlp.gate"), ["f", None, None, None]),
        (["model.layers.1"], linear("model.layers.11.mlp.gate"), ["f"] * 4),
        (["*.mlp.gate"], linear("model.layers.1.mlp.gate"), ["f", "f", REFUSES, None]),
        # SGLang leaves model. out, and looks anywhere; transformers looks at the end as text
        (["layers.1.gate"], linear("model.layers.1.gate"), ["f", None, None, "f"]),
        (["gate"], linear("model.layers.1.gate"), ["f", None, None, "f"]),
        (["gate"], linear("model.layers.1.delegate"), ["f", "f", None, "f"]),
        (list(QKV.members), QKV, [None] * 4),
        (list(QKV.members[:2]), QKV, [REFUSES, REFUSES, REFUSES, None]),
        # one expert: all of the layer in vLLM and SGLang
        (["l.1.mlp.experts.7.up_proj"], EXPERTS, [None, None, "f", "f"]),
        (["l.1.mlp.experts"], EXPERTS, [None] * 4),
        (
            ["l.1.mlp.shared_experts.down_proj"],
            linear("l.1.mlp.shared_experts.down_proj"),
            [None] * 4,
        ),
    ],
)
def test_fp8(entries, module, found):
    assert read(fp8_readers(entries, "f"), module) == found


@pytest.mark.parametrize(
    ("layers", "module", "found"),
    # in vLLM, SGLang, TensorRT-LLM
    [
        ({"l.1.mlp.experts": "a"}, EXPERTS, ["a"] * 3),
        ({"l.1.mlp.experts.0.up_proj": "a"}, EXPERTS, ["a"] * 3),
        ({"l.11.mlp.experts": "a"}, EXPERTS, [None] * 3),
        # shared experts speak for routed ones in vLLM
        ({"l.1.mlp.shared_experts.up_proj": "a"}, EXPERTS, ["a", None, None]),
        # members of a fused module: SGLang needs the name of the module
        (dict.fromkeys(QKV.members, "a"), QKV, ["a", None, "a"]),
        (dict.fromkeys([*QKV.members, QKV.name], "a"), QKV, ["a"] * 3),
        ({QKV.members[0]: "a", QKV.members[1]: "b"}, QKV, [REFUSES, None, "a"]),
        ({}, linear("l.1.mlp.gate"), [None] * 3),
    ],
)
def test_mixes_of_modelopt(layers, module, found):
    assert read(mixed_readers([], layers), module) == found


def test_a_list_excludes_what_the_table_would_not():
    module = [EXPERTS]
    readers = mixed_readers(["l.1.mlp.experts"], {"l.1.mlp.shared_experts.up_proj": "a"})
    assert [read(readers, m) for m in module] == [[None] * 3]


CASES = [
    ("fp8", experts_only("fp8-block")),
    ("fp8", all_linears("fp8-block")),
    (CT, experts_only("nvfp4")),
    (CT, experts_only("nvfp4", names=("w1", "w2", "w3"), block="block_sparse_moe")),
    (CT, all_linears("fp8-channel")),
    (CT, mixed("nvfp4", "fp8-channel")),
    (CT, mixed("nvfp4", "fp8-tensor", shared_format="nvfp4")),
    (CT, mixed("int4-g32", "fp8-channel", shared_format="fp8-channel")),
    ("modelopt", mixed("nvfp4", "fp8-tensor")),
    ("modelopt", mixed("nvfp4", "fp8-tensor", shared_format="fp8-tensor")),
    (
        CT,
        Assignment(
            {
                "nvfp4": [experts(n) for n in LAYERS[1:6]],
                "fp8-channel": [experts(n) for n in LAYERS[6:10]],
                "bf16": [experts(n) for n in LAYERS[10:]],
            },
            {},
            routers(),
            SET_ASIDE,
        ),
    ),
    (
        "modelopt",
        Assignment(
            {
                "nvfp4": [experts(n) for n in LAYERS[1:6]],
                "fp8-tensor": [experts(n) for n in LAYERS[6:10]],
                "bf16": [experts(n) for n in LAYERS[10:]],
            },
            {},
            routers(),
            SET_ASIDE,
        ),
    ),
]


def quantization(dialect, assignment):
    text = find_dialect(dialect).config_files({}, assignment)["config.json"]
    return json.loads(text)["quantization_config"]


def targets_in(config, assignment):
    """Target -> format: the groups stand in the order of the formats."""
    formats = [name for name in assignment.formats if name != "bf16"]
    groups = zip(formats, config["config_groups"].values(), strict=True)
    return {target: name for name, group in groups for target in group["targets"]}


@pytest.mark.parametrize(("dialect", "assignment"), CASES)
def test_all_runtimes_read_a_choice_alike(dialect, assignment):
    """Writing checks it already: asked again here, of what stands in the file."""
    config = quantization(dialect, assignment)
    if dialect == "fp8":
        readers = fp8_readers(config["modules_to_not_convert"], "fp8-block")
    elif dialect == CT:
        readers = compressed_readers(config["ignore"], targets_in(config, assignment))
    else:
        names = {"NVFP4": "nvfp4", "FP8": "fp8-tensor"}
        table = {k: names[v["quant_algo"]] for k, v in config["quantized_layers"].items()}
        readers = mixed_readers(config["ignore"], table)
    seen = set()
    for module in built_of(assignment):
        assert set(read(readers, module)) == {module.format}, module
        seen.add(module.format)
    assert None in seen


@pytest.mark.parametrize("assignment", [a for dialect, a in CASES if dialect == CT])
@pytest.mark.parametrize(
    ("old", "new"),
    [("model.", "language_model.model."), ("model.", "model.language_model."), ("model.", "")],
)
def test_expressions_hold_under_other_prefixes(assignment, old, new):
    """SGLang and vLLM put other prefixes before the layers, and translate no expression."""
    config = quantization(CT, assignment)
    ignore = [entry for entry in config["ignore"] if entry.startswith("re:")]
    readers = compressed_readers(ignore, targets_in(config, assignment))
    for module in built_of(assignment):
        if module.name.startswith("mtp"):
            continue
        names = [n.replace(old, new, 1) for n in (module.name, *module.members)]
        moved = Built(names[0], tuple(names[1:]), module.format, module.is_experts)
        found = dict(zip(readers, read(readers, moved), strict=True))
        assert {found["vLLM"], found["SGLang"]} == {module.format}, moved


@pytest.mark.parametrize("assignment", [a for dialect, a in CASES if dialect == CT])
def test_all_of_a_part_that_stays_whole_is_left_alone(assignment):
    """Runtimes build modules there that no tensor of the checkpoint names."""
    config = quantization(CT, assignment)
    readers = compressed_readers(config["ignore"], targets_in(config, assignment))
    for part in assignment.set_aside:
        assert read(readers, linear(f"{part}.blocks.7.fc1")) == [None] * 4, part


def test_the_library_reads_it_as_we_say():
    torch = pytest.importorskip("torch")
    match = pytest.importorskip("compressed_tensors.utils.match")
    module = torch.nn.Linear(1, 1)
    for dialect, assignment in CASES:
        if dialect != CT:
            continue
        config = quantization(CT, assignment)
        targets = targets_in(config, assignment)
        for built in built_of(assignment):
            for name in built.members:
                ignored = match.is_match(name, module, config["ignore"])
                found = None if ignored else match.match_targets(name, module, targets)
                assert (targets[found[0]] if found else None) == built.format, name
                for entry in (*config["ignore"], *targets):
                    if entry != "Linear":
                        assert fits(entry, name) == match.match_name(name, entry)


def test_transformers_reads_fp8_as_we_say():
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    for dialect, assignment in CASES:
        if dialect != "fp8":
            continue
        entries = quantization("fp8", assignment)["modules_to_not_convert"]
        for built in built_of(assignment):
            for name in built.linears:
                assert utils.should_convert_module(name, entries) == bool(built.format), name
    for entries in (["a.b"], ["b"], ["a.1"], ["lm_head"]):
        reader = fp8_readers(entries, "f")["transformers"]
        for name in ("a.b", "a.b.c", "a.bc", "x.a.b", "a.1", "a.11.b", "lm_head", "my_lm_head"):
            assert utils.should_convert_module(name, entries) == (reader(linear(name)) == "f")


def test_names_that_no_list_can_tell_apart_are_refused():
    """transformers looks at the end of a name: a kept ``gate`` is the end of another's name."""
    assignment = Assignment(
        {"fp8-block": [experts(1)]},
        {"fp8-block": ["model.layers.1.mlp.delegate"]},
        ["gate"],
        {},
    )
    with pytest.raises(LayoutError, match=r"delegate: no list .* tells transformers"):
        find_dialect("fp8").config_files({}, assignment)


def test_no_list_names_a_single_expert():
    for dialect, assignment in CASES:
        config = quantization(dialect, assignment)
        names = config.get("ignore") or config["modules_to_not_convert"]
        assert not any(".experts.0" in name for name in names)
