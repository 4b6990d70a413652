"""What must be refused, and what the user's own word can and cannot settle."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.command import run_cli
from kit.files import write_headers

import moe_ckpt
from moe_ckpt.errors import CheckpointError, LayoutError, UsageError
from moe_ckpt.layouts.family import LAYOUTS
from moe_ckpt.layouts.table import FAMILIES

E, I, H = 4, 32, 64
CONFIG = {
    "num_experts": E,
    "moe_intermediate_size": I,
    "hidden_size": H,
    "num_hidden_layers": 1,
}
MLP = "model.layers.0.mlp.experts"
STORED = {  # layout -> tensors of one layer
    "split": {
        f"{MLP}.{e}.{name}_proj.weight": ("BF16", shape)
        for e in range(E)
        for name, shape in (("gate", [I, H]), ("up", [I, H]), ("down", [H, I]))
    },
    "fused": {
        f"{MLP}.gate_up_proj": ("BF16", [E, 2 * I, H]),
        f"{MLP}.down_proj": ("BF16", [E, H, I]),
    },
    "fused-transposed": {
        f"{MLP}.gate_up_proj": ("BF16", [E, H, 2 * I]),
        f"{MLP}.down_proj": ("BF16", [E, I, H]),
    },
    "stacked": {
        f"{MLP}.gate_proj": ("BF16", [E, I, H]),
        f"{MLP}.up_proj": ("BF16", [E, I, H]),
        f"{MLP}.down_proj": ("BF16", [E, H, I]),
    },
}


def plan(tmp_path, tensors, model_type, options=None, **config):
    config = {key: value for key, value in (CONFIG | config).items() if value is not None}
    folder = write_headers(
        tmp_path / "in", {"model.safetensors": tensors}, config | {"model_type": model_type}
    )
    return moe_ckpt.make_plan(folder, format="nvfp4-w4a16", **(options or {}))


def refusal(tmp_path, tensors, model_type, options=None, **config):
    with pytest.raises((LayoutError, CheckpointError)) as caught:
        plan(tmp_path, tensors, model_type, options, **config)
    return "\n".join(caught.value.problems)


PACKED = {
    "gpt_oss MXFP4": (
        "gpt_oss",
        {
            f"{MLP}.gate_up_proj_blocks": ("U8", [E, 64, 2, 16]),
            f"{MLP}.gate_up_proj_scales": ("U8", [E, 64, 3]),
        },
        "MXFP4",
    ),
    "GPTQ": (
        "qwen3_moe",
        {f"{MLP}.0.up_proj.qweight": ("I32", [8, I]), f"{MLP}.0.up_proj.g_idx": ("I32", [H])},
        "GPTQ",
    ),
    "AWQ": (
        "qwen3_moe",
        {f"{MLP}.0.up_proj.qweight": ("I32", [H, 4]), f"{MLP}.0.up_proj.qzeros": ("I32", [1, 4])},
        "AWQ",
    ),
    "bitsandbytes": (
        "qwen3_moe",
        {
            f"{MLP}.0.up_proj.weight.absmax": ("U8", [32]),
            f"{MLP}.0.up_proj.weight": ("U8", [1024, 1]),
        },
        "bitsandbytes",
    ),
    "compressed-tensors int4": (
        "qwen3_moe",
        {
            f"{MLP}.0.up_proj.weight_packed": ("I32", [I, 8]),
            f"{MLP}.0.up_proj.weight_shape": ("I64", [2]),
        },
        "compressed-tensors",
    ),
    "compressed-tensors NVFP4": (
        "qwen3_moe",
        {
            f"{MLP}.0.up_proj.weight_packed": ("U8", [I, 32]),
            f"{MLP}.0.up_proj.weight_global_scale": ("F32", [1]),
        },
        "NVFP4 of compressed-tensors",
    ),
    "ModelOpt NVFP4": (
        "qwen3_moe",
        {
            f"{MLP}.0.up_proj.weight": ("U8", [I, 32]),
            f"{MLP}.0.up_proj.weight_scale_2": ("F32", []),
        },
        "NVFP4 of ModelOpt",
    ),
    "ModelOpt fused NVFP4": (
        "llama4_text",
        {
            "model.layers.0.feed_forward.experts.gate_up_proj": ("U8", [E, 32, 64]),
            "model.layers.0.feed_forward.experts.gate_up_proj_weight_scale_2": ("F32", []),
        },
        "NVFP4 of ModelOpt",
    ),
    "FP8 in blocks": (
        "deepseek_v3",
        {
            f"{MLP}.0.up_proj.weight": ("F8_E4M3", [I, H]),
            f"{MLP}.0.up_proj.weight_scale_inv": ("F32", [1, 2]),
        },
        "FP8 in blocks",
    ),
    "FP8": (
        "mistral4",
        {
            f"{MLP}.gate_up_proj": ("F8_E4M3", [E, 64, H]),
            f"{MLP}.down_proj": ("F8_E4M3", [E, H, I]),
        },
        "FP8",
    ),
    "MLX": (
        "qwen3_moe",
        {"model.layers.0.mlp.switch_mlp.up_proj.weight": ("U32", [E, I, 8])},
        "MLX",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_experts_are_refused_by_the_name_of_their_format(tmp_path, case):
    model_type, tensors, name = PACKED[case]
    assert name in refusal(tmp_path, tensors, model_type)


def test_an_adapter_is_refused(tmp_path):
    adapter = {f"base_model.model.{MLP}.gate_up_proj.lora_A.weight": ("BF16", [64, H])}
    assert "an adapter, such as LoRA" in refusal(tmp_path, adapter, "qwen3_moe")


@pytest.mark.parametrize(
    ("tensors", "model_type", "config", "words"),
    [
        # LongCat as transformers saves it: gate_up has the experts that do nothing, down has not.
        (
            {
                f"{MLP}.gate_up_proj": ("BF16", [E + 2, 2 * I, H]),
                f"{MLP}.down_proj": ("BF16", [E, H, I]),
            },
            "longcat_flash",
            {},
            ["[6, 64, 64]", "differ: 4, 6"],
        ),
        # MLX puts the shared expert behind the routed ones.
        (
            {
                f"{MLP}.gate_up_proj": ("BF16", [E + 1, 2 * I, H]),
                f"{MLP}.down_proj": ("BF16", [E + 1, H, I]),
            },
            "qwen3_moe",
            {},
            ["5 experts", "num_experts=4"],
        ),
        # one of two tensor-parallel shards; one of two expert-parallel shards
        (
            {
                f"{MLP}.gate_up_proj": ("BF16", [E, I, H]),
                f"{MLP}.down_proj": ("BF16", [E, H, I // 2]),
            },
            "qwen3_moe",
            {},
            ["16 rows of up (I)", "moe_intermediate_size=32"],
        ),
        (
            {
                f"{MLP}.gate_up_proj": ("BF16", [E // 2, 2 * I, H]),
                f"{MLP}.down_proj": ("BF16", [E // 2, H, I]),
            },
            "qwen3_moe",
            {},
            ["2 experts", "num_experts=4"],
        ),
        (
            {"model.layers.0.ffn.experts.mlp.w1": ("BF16", [E * I, H])},
            "dbrx",
            {},
            ["only", "ffn.experts.mlp.{w1, v1, w2}"],
        ),
        # E * I = 128 is 4 experts of 32 rows, or 2 of 64
        (
            {f"model.layers.0.ffn.experts.mlp.{n}": ("BF16", [128, H]) for n in ("w1", "v1", "w2")},
            "dbrx",
            {"num_experts": [4, 2], "moe_intermediate_size": [32, 64]},
            ["[128, 64]", "4 * 32 and 2 * 64"],
        ),
        (
            {
                "model.layers.0.mixer.experts.up_proj": ("BF16", [E, H, I]),
                "model.layers.0.mixer.experts.down_proj": ("BF16", [E, I, H]),
            },
            "nemotron_h",
            {},
            ["64 rows of up (I)", "moe_intermediate_size=32"],
        ),
        (
            STORED["fused-transposed"],
            "gpt_oss",
            {},
            ["gate_up_proj_bias", "expected a bias [4, 64], found nothing"],
        ),
        (
            STORED["fused-transposed"]
            | {
                f"{MLP}.gate_up_proj_bias": ("BF16", [E, I]),
                f"{MLP}.down_proj_bias": ("BF16", [E, H]),
            },
            "gpt_oss",
            {},
            ["gate_up_proj_bias", "found [4, 32]"],
        ),
        (
            {
                name: info
                for e in range(3 * E)
                for name, info in {
                    f"{MLP}.{e}.gate_proj.weight": ("BF16", [16 * (1 + e // E), H]),
                    f"{MLP}.{e}.up_proj.weight": ("BF16", [16 * (1 + e // E), H]),
                    f"{MLP}.{e}.down_proj.weight": ("BF16", [H, 16 * (1 + e // E)]),
                }.items()
            },
            "ernie4_5_vl_moe",
            {"moe_intermediate_size": [16, 32, 48]},
            ["12 experts", "2 widths", "[16, 32, 48]"],
        ),
    ],
)
def test_the_numbers_are_given(tmp_path, tensors, model_type, config, words):
    text = refusal(tmp_path, tensors, model_type, {"experts": "split"}, **config)
    for word in words:
        assert word in text, text


# What the user says.


@pytest.mark.parametrize("layout", STORED)
def test_an_unknown_model_type_needs_the_users_word(tmp_path, layout):
    assert "--layout" in refusal(tmp_path, STORED[layout], "new_moe")
    options = {"layout": layout}
    if LAYOUTS[layout].joins_gate_up:
        assert "--gate-up-order" in refusal(tmp_path, STORED[layout], "new_moe", options)
        options["gate_up_order"] = "interleaved"
    made = plan(tmp_path, STORED[layout], "new_moe", options)
    (experts,) = made.experts
    assert (experts.layout, experts.output) == (layout, MLP)
    assert experts.order == options.get("gate_up_order", "concat")
    assert (experts.num_experts, experts.intermediate, experts.hidden) == (E, I, H)
    assert made.runtimes == ()
    assert any("no runtime is known" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("stored", "model_type", "options", "words"),
    [
        (
            "fused",
            "new_moe",
            {"layout": "fused-transposed", "gate_up_order": "concat"},
            "these are fused",
        ),
        (
            "fused-transposed",
            "new_moe",
            {"layout": "fused", "gate_up_order": "concat"},
            "fused-transposed",
        ),
        (
            "fused",
            "new_moe",
            {"layout": "stacked"},
            "only model.layers.0.mlp.experts.down_proj is there",
        ),
        ("fused", "new_moe", {"layout": "flat"}, "known only for families in the table"),
        (
            "split",
            "new_moe",
            {"layout": "split", "gate_up_order": "concat"},
            "leave the option out",
        ),
        ("fused", "qwen3_moe", {"layout": "fused-transposed"}, "is stored as fused or split"),
        ("fused", "qwen3_moe", {"gate_up_order": "interleaved"}, "stores gate and up concat"),
        ("fused", "qwen3_moe", {"layout": "split"}, "is stored fused; leave the option out"),
        ("fused", "qwen3_vl_moe", {"layout": "fused-transposed"}, "[4, 64, 64]"),
        ("split", "qwen3_moe", {"layout": "fused"}, "is stored split; leave the option out"),
        ("split", "qwen3_moe", {"gate_up_order": "concat"}, "is stored split"),
        ("fused", "qwen3_moe", {"experts": "fused"}, "ModelOpt has no fused export"),
    ],
)
def test_a_word_that_contradicts_the_evidence_is_refused(
    tmp_path, stored, model_type, options, words
):
    assert words in refusal(tmp_path, STORED[stored], model_type, options)


ERNIE = {"moe_num_experts": [2, 2], "num_experts": None, "moe_intermediate_size": [32, 16]}


def ernie(*widths):
    return {
        f"{MLP}.{e}.{name}_proj.weight": ("BF16", shape)
        for e, i in enumerate(widths)
        for name, shape in (("gate", [i, H]), ("up", [i, H]), ("down", [H, i]))
    }


@pytest.mark.parametrize(
    ("widths", "config", "words"),
    [
        ((32, 32), {}, "has 2 experts"),  # the vision experts are missing
        ((16, 16), {}, "has 2 experts"),
        ((16, 16, 32, 32), {}, "has 16 rows of up (I), config.json says 32 for experts 0 to 1"),
        ((32, 32, 48, 48), {"intermediate_size": 48}, "config.json says 16 for experts 2 to 3"),
        ((32, 32, 32, 16), {}, "experts.3: has matrices [16, 64]"),
        ((32, 16, 16, 16), {}, "experts.1: has matrices [16, 64]"),
        ((32, 32, 16, 16), {"moe_num_experts": [1, 3]}, "experts.2: has matrices"),
        ((32, 32, 16, 16), {"moe_intermediate_size": 32}, "of 2 widths"),
    ],
)
def test_groups_of_experts_are_those_of_the_config(tmp_path, widths, config, words):
    assert words in refusal(tmp_path, ernie(*widths), "ernie4_5_moe_vl", **ERNIE | config)


@pytest.mark.parametrize("widths", [(32, 32, 16, 16), (32, 32, 32, 32)])
def test_groups_of_experts_may_have_one_width(tmp_path, widths):
    config = ERNIE | {"moe_intermediate_size": [widths[0], widths[-1]]}
    found = plan(tmp_path, ernie(*widths), "ernie4_5_vl_moe", **config).experts
    assert [(e.first, e.num_experts, e.intermediate) for e in found] == [
        (0, 2, widths[0]),
        (2, 2, widths[-1]),
    ]


ARIA = {
    f"{MLP}.{leaf}": STORED["fused-transposed"][f"{MLP}.{name}"]
    for leaf, name in (("fc1.weight", "gate_up_proj"), ("fc2.weight", "down_proj"))
}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (ARIA | STORED["fused-transposed"], "in two forms"),
        (dict(list(ARIA.items())[:1] + list(STORED["fused-transposed"].items())[1:]), "only"),
    ],
)
def test_two_names_for_one_layout_do_not_mix(tmp_path, tensors, words):
    assert words in refusal(tmp_path, tensors, "aria", {"experts": "split"})


def test_experts_with_biases_are_not_known_one_by_one(tmp_path):
    text = refusal(tmp_path, STORED["split"], "gpt_oss")
    assert "looks like experts" in text
    assert "E.{" not in text


def test_layers_of_both_orientations_are_refused(tmp_path):
    other = {
        name.replace("layers.0", "layers.1"): info
        for name, info in STORED["fused-transposed"].items()
    }
    config = {"num_hidden_layers": 2, "hidden_size": 96}
    sizes = {2 * I: 96}  # H, so that nothing is square
    both = {
        name: (dtype, [E, *(sizes.get(n, n) for n in shape[1:])])
        for name, (dtype, shape) in (STORED["fused"] | other).items()
    }
    both[f"{MLP}.gate_up_proj"] = ("BF16", [E, 2 * I, 96])
    both["model.layers.1.mlp.experts.gate_up_proj"] = ("BF16", [E, 96, 2 * I])
    text = refusal(tmp_path, both, "qwen3_vl_moe", **config)
    assert "layers.1.mlp.experts: is stored fused-transposed" in text
    assert "layers.0.mlp.experts is stored fused" in text


def test_an_adapter_without_its_model_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    done = run_cli("inspect", folder)
    assert done.returncode == 3
    assert "LoRA adapter without its model; merge it" in done.stderr


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, 'quant_method "gptq" cannot be read'),
        ({"quant_method": "awq"}, 'quant_method "awq" cannot be read'),
        ({"bits": 4}, "quant_method null cannot be read"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"),
    ],
)
def test_a_quantization_that_cannot_be_read_is_named(tmp_path, said, words):
    with pytest.raises(moe_ckpt.CheckpointError) as caught:
        plan(tmp_path, STORED["fused"], "qwen3_moe", quantization_config=said)
    assert words in str(caught.value)


@pytest.mark.parametrize("option", ["--layout", "--gate-up-order", "--experts"])
def test_an_unknown_word_is_a_usage_error_whatever_the_input(tmp_path, option):
    done = run_cli("convert", tmp_path / "nothing", tmp_path / "out", option, "bogus")
    assert done.returncode == 2
    assert f"{option} 'bogus' is unknown; choose" in done.stderr


def test_inspect_shows_what_auto_refuses(tmp_path):
    tensors = {
        f"model.blocks.0.ffn.experts.mlp.{n}": ("BF16", [E * I, H]) for n in ("w1", "v1", "w2")
    }
    with pytest.raises(LayoutError, match="SGLang reads w1, v1 and w2"):
        plan(tmp_path, tensors, "dbrx")
    done = run_cli("inspect", tmp_path / "in", "--experts", "split")
    assert done.returncode == 0
    assert "4 experts, flat, as in model.blocks.0.ffn.experts.mlp" in done.stderr


def test_biases_of_an_unknown_model_type_are_refused(tmp_path):
    tensors = STORED["fused"] | {f"{MLP}.gate_up_proj_bias": ("BF16", [E, 2 * I])}
    options = {"layout": "fused", "gate_up_order": "concat"}
    text = refusal(tmp_path, tensors, "new_moe", options)
    assert "gate_up_proj_bias" in text
    assert "Biases of experts are known only for families in the table" in text


@pytest.mark.parametrize(
    "options",
    [{"layout": "diagonal"}, {"gate_up_order": "shuffled"}, {"experts": "molten"}],
)
def test_words_that_are_not_known(tmp_path, options):
    with pytest.raises(UsageError, match="is unknown; choose"):
        plan(tmp_path, STORED["fused"], "qwen3_moe", options)


@pytest.mark.parametrize(("i", "h"), [(32, 64), (64, 64)])
@pytest.mark.parametrize("layout", ["fused", "fused-transposed"])
def test_a_word_settles_a_square_matrix_that_could_be_either(tmp_path, i, h, layout):
    shapes = {"fused": ([E, 2 * i, h], [E, h, i]), "fused-transposed": ([E, h, 2 * i], [E, i, h])}
    gate_up, down = shapes[layout]
    tensors = {f"{MLP}.gate_up_proj": ("BF16", gate_up), f"{MLP}.down_proj": ("BF16", down)}
    sizes = {"moe_intermediate_size": i, "hidden_size": h}
    assert "square" in refusal(tmp_path, tensors, "qwen3_vl_moe", **sizes)
    made = plan(tmp_path, tensors, "qwen3_vl_moe", {"layout": layout}, **sizes)
    assert made.experts[0].layout == layout
    other = next(name for name in shapes if name != layout)
    assert "expected" in refusal(tmp_path, tensors, "qwen3_vl_moe", {"layout": other}, **sizes)


SIZES = st.sampled_from([2, 4, 8, 16, 32, 64])
TYPES = [t for family in FAMILIES for t in family.model_types if family.forms]


@given(
    e=SIZES,
    i=SIZES,
    h=SIZES,
    layout=st.sampled_from(["fused", "fused-transposed"]),
    model_type=st.sampled_from([*TYPES, "new_moe", "qwen3_vl_moe"]),
    told=st.booleans(),
)
@settings(max_examples=400)
def test_never_a_wrong_layout(tmp_path_factory, e, i, h, layout, model_type, told):
    """Right or refused: whatever the sizes, the model type, and whether the user says a word.

    A family whose files have one orientation cannot be stored in another here: no header test
    can tell that of a square matrix.
    """
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    forms = [f for f in family.forms if len(f.leaves) == 2] if family else []
    forms = [f for f in forms if not f.leaves[0].endswith("_blocks")]
    form = next((f for f in forms if f.layout == layout), forms[0] if forms else None)
    path, leaves = (
        (form.path, form.leaves) if form else ("mlp.experts", ("gate_up_proj", "down_proj"))
    )
    shapes = ([e, 2 * i, h], [e, h, i])
    if layout == "fused-transposed":
        shapes = tuple([a, c, b] for a, b, c in shapes)
    tensors = {
        f"model.layers.0.{path}.{leaf}": ("BF16", s) for leaf, s in zip(leaves, shapes, strict=True)
    }
    if form and form.biases:
        for leaf, n in zip(form.biases, (2 * i, h), strict=True):
            tensors[f"model.layers.0.{path}.{leaf}"] = ("BF16", [e, n])
    config = {"num_experts": e, "moe_intermediate_size": i, "hidden_size": h}
    options = {"experts": "split"}
    if told:
        options |= {"layout": layout}
        options |= {} if family else {"gate_up_order": "concat"}
    folder = tmp_path_factory.mktemp("in")
    known = {f.layout for f in forms}
    degenerate = len({(2 * i, h), (h, 2 * i)}) == 1 or i == h
    try:
        made = plan(folder, tensors, model_type, options, num_hidden_layers=1, **config)
    except moe_ckpt.InputError:
        unknown_and_silent = family is None and not told
        odd = i % 16 or h % 16
        contradicts = bool(family) and layout not in known
        open_question = known == {"fused", "fused-transposed"} and degenerate and not told
        assert unknown_and_silent or odd or contradicts or open_question
        return
    (experts,) = made.experts
    if family and layout not in known:
        # Stored against its family's one orientation, and accepted: only if all shapes agree.
        expected = LAYOUTS[experts.layout].solve([tuple(shape) for shape in shapes])
        assert expected == {"E": e, "I": i, "H": h}
        assert all(len(set(shape[1:])) == 1 for shape in shapes)
        return
    assert experts.layout == layout
    assert (experts.num_experts, experts.intermediate, experts.hidden) == (e, i, h)


def test_layouts_lists_every_family():
    done = run_cli("layouts")
    assert done.returncode == 0
    for family in FAMILIES:
        assert f"  {family.name}: {', '.join(family.model_types)}" in done.stdout
    table = json.loads(run_cli("layouts", "--json").stdout)
    assert [row["family"] for row in table["families"]] == [family.name for family in FAMILIES]
    row = next(row for row in table["families"] if row["family"] == "llama4")
    assert row["loads_in"] == {"llama4": ["vLLM", "SGLang"]}
    assert row["fused_loads_in"]["nvfp4"] == ["vLLM", "TensorRT-LLM"]
    assert row["read"][0]["layout"] == "fused-transposed"
    ernie = next(row for row in table["families"] if row["family"] == "ernie4_5_vl_moe")
    assert ernie["widths"] == 2
    assert "interleaved is a" in done.stdout
    assert "fused-transposed, gate and up interleaved, with biases: mlp.experts" in done.stdout
    assert set(table["checks"]) >= {row["checked"] for row in table["families"]}


def test_warnings_name_runtimes_that_would_misread(tmp_path):
    tensors = {
        name.replace("mlp", "feed_forward"): info
        for name, info in STORED["fused-transposed"].items()
    }
    text = "\n".join(plan(tmp_path, tensors, "llama4").warnings)
    assert "transformers reads the experts of llama4 only fused" in text
    text = "\n".join(plan(tmp_path, STORED["fused"], "qwen3_moe").warnings)
    assert "transformers" not in text
