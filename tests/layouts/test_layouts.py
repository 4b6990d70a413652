"""Detection on headers that transformers writes for many model types, in both of its save modes.

A is the default (the names of the original release), B is `save_original_format=False`. What is
expected of each is in fixtures/layout-expected.toml.
"""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from kit.files import FIXTURES, write_headers

import moe_ckpt
from moe_ckpt.errors import CheckpointError, LayoutError
from moe_ckpt.layouts.table import FAMILIES, UNSUPPORTED

HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
EXPECTED = tomllib.loads((FIXTURES / "layout-expected.toml").read_text())

ALL = [(name, mode) for name in HEADERS for mode in "AB"]
REFUSED = [pair for pair in ALL if EXPECTED[pair[0]][pair[1]].startswith("refused: ")]
ACCEPTED = [pair for pair in ALL if pair not in REFUSED]
FUSED = [pair for pair in ACCEPTED if EXPECTED[pair[0]].get("auto", "split") == "fused"]
SPLIT_IN_A = [
    name for name, mode in ACCEPTED if mode == "B" and EXPECTED[name]["A"].startswith("split")
]


def checkpoint(tmp_path, name, mode):
    saved = HEADERS[name][mode]
    return write_headers(
        tmp_path / f"{name}-{mode}", {"model.safetensors": saved["header"]}, saved["config"]
    )


def plan_of(tmp_path, folder, quantize="experts", experts="split", **options):
    """A plan in a format that takes any size; the models here have I=24."""
    stats = tmp_path / "stats.json"
    stats.write_text('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"none": {}}}')
    return moe_ckpt.make_plan(
        folder,
        format="fp8-tensor",
        stats=[stats],
        missing_stats="constant",
        quantize=quantize,
        experts=experts,
        **options,
    )


def test_every_header_has_an_expectation():
    assert EXPECTED.keys() == HEADERS.keys()


@pytest.mark.parametrize(("name", "mode"), ACCEPTED)
@pytest.mark.parametrize("quantize", ["experts", "linear"])
def test_accepted(tmp_path, name, mode, quantize):
    plan = plan_of(tmp_path, checkpoint(tmp_path, name, mode), quantize)
    layout, _, order = EXPECTED[name][mode].partition(" ")
    assert {(e.layout, e.order) for e in plan.experts} == {(layout, order or "concat")}
    sizes = {(e.num_experts, e.intermediate, e.hidden) for e in plan.experts}
    assert sizes == {(8, 24, 64)} | ({(8, 16, 64)} if name == "ernie4_5_vl_moe" else set())
    prefix, leaves = EXPECTED[name]["experts"].split(".*.")
    layer = re.sub(r"(layers|blocks)\.\d+.*", "", prefix)
    wanted = {
        f"{prefix}.{e}.{leaf}.weight"
        for e in range(16 if name == "ernie4_5_vl_moe" else 8)
        for leaf in leaves.strip("{}").split(",")
    }
    names = {tensor.name for shard in plan.shards for tensor in shard.tensors}
    names = {n for n in names if n.startswith(f"{prefix}.") and n.endswith(".weight")}
    assert names - {f"{prefix}.post_expert_norm.weight"} == wanted
    assert all(e.output.startswith(layer) for e in plan.experts)


@pytest.mark.parametrize(("name", "mode"), REFUSED)
def test_refused(tmp_path, name, mode):
    word = EXPECTED[name][mode].removeprefix("refused: ")
    with pytest.raises(LayoutError, match=re.escape(word)):
        plan_of(tmp_path, checkpoint(tmp_path, name, mode))


@pytest.mark.parametrize(("name", "mode"), ACCEPTED)
def test_auto_writes_what_most_runtimes_read(tmp_path, name, mode):
    folder = checkpoint(tmp_path, name, mode)
    wanted = EXPECTED[name].get("auto", "split")
    if wanted == "refused":
        with pytest.raises(LayoutError, match=r"no runtime is known .*--experts split"):
            plan_of(tmp_path, folder, experts="auto")
    else:
        assert plan_of(tmp_path, folder, experts="auto").experts_as == wanted


@pytest.mark.parametrize("name", SPLIT_IN_A)
def test_fused_form_gets_the_names_of_the_original_release(tmp_path, name):
    plan = plan_of(tmp_path, checkpoint(tmp_path, name, "B"))
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    scales = (".weight_scale", ".input_scale")
    ours = {
        tensor.name: list(tensor.shape) for tensor in tensors if not tensor.name.endswith(scales)
    }
    assert ours == {key: shape for key, (_, shape) in HEADERS[name]["A"]["header"].items()}


@pytest.mark.parametrize(
    ("name", "mode", "experts"),
    [*((*pair, "split") for pair in ACCEPTED), *((*pair, "fused") for pair in FUSED)],
)
def test_every_source_tensor_goes_one_way(tmp_path, name, mode, experts):
    """Every byte of the source is read by one job or one copy, and each tensor by one kind."""
    plan = plan_of(tmp_path, checkpoint(tmp_path, name, mode), "linear", experts)
    copies = [copy for shard in plan.shards for copy in shard.copies]
    slabs = [slab for shard in plan.shards for job in shard.jobs for slab in job.place.slabs]
    ranges = [(copy.read.offset, copy.read.nbytes) for copy in copies]
    ranges += [(read.offset, read.nbytes) for slab in slabs for (read,) in slab.reads]
    end = plan.source_shards[0].nbytes - plan.source_nbytes
    for offset, nbytes in sorted(found for found in ranges if found[1]):
        assert offset == end
        end += nbytes
    assert end == plan.source_shards[0].nbytes
    quantized = {label.partition("[")[0] for slab in slabs for label in slab.labels}
    copied = {copy.source for copy in copies}
    assert not quantized & copied
    assert quantized | copied == HEADERS[name][mode]["header"].keys()


def test_no_model_type_is_in_two_rows():
    types = [t for family in FAMILIES for t in family.model_types] + list(UNSUPPORTED)
    assert len(types) == len(set(types))


def test_tensorrt_llm_has_model_types_of_the_rows_that_say_so():
    for family in FAMILIES:
        assert {*family.in_tensorrt_llm} <= {*family.model_types}, family.name
        for model_type in family.model_types:
            has_it = "TensorRT-LLM" in family.split_runtimes(model_type)
            assert has_it == (model_type in family.in_tensorrt_llm)


# Below: one small fused checkpoint, changed in one way each.

E, I, H = 4, 24, 64
CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts": E,
    "moe_intermediate_size": I,
    "hidden_size": H,
    "num_hidden_layers": 2,
}
PREFIX = "model.layers.{}.mlp.experts"


def fused(layers=2, gate_up=(E, 2 * I, H), down=(E, H, I), dtype="BF16"):
    tensors = {}
    for layer in range(layers):
        tensors[PREFIX.format(layer) + ".gate_up_proj"] = (dtype, list(gate_up))
        tensors[PREFIX.format(layer) + ".down_proj"] = (dtype, list(down))
    return tensors


def split(layer=0):
    tensors = {}
    for e in range(E):
        for name, shape in (("gate", [I, H]), ("up", [I, H]), ("down", [H, I])):
            tensors[f"{PREFIX.format(layer)}.{e}.{name}_proj.weight"] = ("BF16", shape)
    return tensors


def refusal(tmp_path, tensors, options=None, **config):
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, CONFIG | config)
    with pytest.raises((LayoutError, CheckpointError)) as caught:
        plan_of(tmp_path, folder, **(options or {}))
    return caught.value.problems


def test_both_forms_in_one_checkpoint(tmp_path):
    folder = write_headers(tmp_path / "in", {"model.safetensors": fused(1) | split(1)}, CONFIG)
    assert [found.layout for found in plan_of(tmp_path, folder).experts] == ["fused", "split"]


@pytest.mark.parametrize(("i", "h"), [(32, 64), (64, 64), (64, 128)])
def test_square_matrices_are_read_as_the_table_says(tmp_path, i, h):
    tensors = fused(gate_up=(E, 2 * i, h), down=(E, h, i))
    config = CONFIG | {"moe_intermediate_size": i, "hidden_size": h}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    found = plan_of(tmp_path, folder).experts[0]
    assert (found.intermediate, found.hidden) == (i, h)


@pytest.mark.parametrize(("i", "h"), [(32, 64), (64, 64)])
def test_square_matrices_are_refused_where_both_orientations_exist(tmp_path, i, h):
    tensors = fused(gate_up=(E, 2 * i, h), down=(E, h, i))
    problems = refusal(
        tmp_path, tensors, model_type="qwen3_vl_moe", moe_intermediate_size=i, hidden_size=h
    )
    assert "square" in problems[0]


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (
            fused(gate_up=(E, H, 2 * I), down=(E, I, H)),
            {},
            ["these are fused-transposed", "[4, 64, 48]"],
        ),
        (fused(gate_up=(E, 2 * I, H), down=(E, I, H)), {}, ["opposite orientations"]),
        (fused(gate_up=(E, 2 * I + 1, H)), {}, ["[4, 49, 64]", "odd number of rows, 49"]),
        (fused(gate_up=(E, H, 2 * I)), {}, ["opposite orientations"]),
        # the dense width of the config is not the experts'
        (fused(gate_up=(E, I, H), down=(E, H, I // 2)), {"intermediate_size": I // 2}, ["=24"]),
        # 3-D, of the experts' sizes, and no name that says so
        (fused(1) | {"model.layers.1.ffn.w13": ("BF16", [E, 2 * I, H])}, {}, ["ffn.w13"]),
        (fused(gate_up=(E + 1, 2 * I, H)), {}, ["differ: 4, 5"]),
        (fused(), {"num_experts": 8}, ["4 experts", "num_experts=8"]),
        (fused(), {"num_experts": None}, ["4 experts", "nothing"]),
        (fused(), {"moe_intermediate_size": 48}, ["24 rows", "moe_intermediate_size=48"]),
        (fused(), {"hidden_size": 32}, ["64 columns", "hidden_size=32"]),
        (fused(), {"num_local_experts": 8}, ["disagree", "num_local_experts=8"]),
        (fused(), {"text_config": {"num_experts": 16}}, ["disagree", "text_config.num_experts=16"]),
        (fused(), {"num_hidden_layers": 1}, ["model.layers.1", "num_hidden_layers=1"]),
        (fused(), {"draft_config": {"num_hidden_layers": 1}, "num_hidden_layers": 0}, ["layers=1"]),
        (
            fused(1) | {"model.layers.1.mlp.gate.weight": ("BF16", [E, H])},
            {},
            ["layers.1.mlp.gate.weight", "no experts"],
        ),
        (fused(dtype="U8"), {}, ["U8"]),
        (fused(dtype="F8_E4M3"), {}, ["F8_E4M3"]),
        (fused(gate_up=(E, 2 * I)), {}, ["[4, 48] with", "expected [E, 2I, H], [E, H, I]"]),
        (fused(gate_up=(0, 2 * I, H), down=(0, H, I)), {}, ["[0, 48, 64]"]),
        ({"model.norm.weight": ("BF16", [H])}, {}, ["no routed experts"]),
        (fused(), {"model_type": "new_moe"}, ["new_moe", "moe-ckpt layouts", "[4, 48, 64]"]),
        (fused(), {"model_type": None}, ["model_type null"]),
        (fused(1) | split(0), {}, ["in two forms"]),
        # of two forms, the one that is not whole is named first
        (
            fused() | {PREFIX.format(1) + ".3.gate_proj.weight": ("BF16", [I, H])},
            {},
            ["layers.1: has its experts in two forms: model.layers.1.mlp.experts.3.gate_proj.weig"],
        ),
        (
            split() | {PREFIX.format(0) + ".gate_up_proj": ("BF16", [E, 2 * I, H])},
            {},
            ["layers.0: has its experts in two forms: model.layers.0.mlp.experts.gate_up_proj, an"],
        ),
        (
            fused() | {PREFIX.format(0) + ".gate_up_proj_bias": ("BF16", [E, 2 * I])},
            {},
            ["gate_up_proj_bias"],
        ),
        (
            {k: v for k, v in fused().items() if k != PREFIX.format(1) + ".down_proj"},
            {},
            ["layers.1", "gate_up_proj"],
        ),
        (
            {k: v for k, v in split().items() if ".2.up" not in k},
            {},
            ["1 of 12", "up of expert 2"],
        ),
        (
            split() | {PREFIX.format(0) + ".0.up_proj.weight": ("BF16", [I, H + 1])},
            {},
            ["[24, 65]"],
        ),
        (
            split() | {PREFIX.format(0) + ".1.up_proj.weight": ("BF16", [I, H + 1])},
            {},
            ["experts.1: has", "[24, 65]"],
        ),
        (split() | {PREFIX.format(0) + ".0.up_proj.bias": ("BF16", [I])}, {}, ["up_proj.bias"]),
        (
            fused(1)
            | {
                PREFIX.format(1) + ".gate_up_proj": ("BF16", [E, 4 * I, H]),
                PREFIX.format(1) + ".down_proj": ("BF16", [E, H, 2 * I]),
            },
            {"moe_intermediate_size": [I, 2 * I]},
            ["(4, 48, 64)", "(4, 24, 64)"],
        ),
        (fused() | {"model.layers.0.moe.weird": ("BF16", [E, 5, 5])}, {}, ["moe.weird"]),
    ],
)
def test_refusals_give_the_evidence(tmp_path, tensors, config, words):
    text = "\n".join(refusal(tmp_path, tensors, **config))
    for word in words:
        assert word in text, text


def test_all_problems_are_reported_at_once(tmp_path):
    tensors = fused(gate_up=(E + 1, 2 * I, H)) | {"model.layers.0.moe.weird": ("BF16", [E, 5, 5])}
    assert len(refusal(tmp_path, tensors)) == 3  # two layers, and the unknown tensor


@pytest.mark.parametrize("prefix", ["model.layers.2.mlp.experts", "mtp.layers.0.mlp.experts"])
@pytest.mark.parametrize("form", ["split", "fused"])
def test_multi_token_prediction_is_copied(tmp_path, prefix, form):
    extra = fused(1) if form == "fused" else split(0)
    extra = {name.replace(PREFIX.format(0), prefix): info for name, info in extra.items()}
    extra[prefix.replace(".experts", ".gate.weight")] = ("BF16", [E, H])
    extra[prefix.replace("mlp.experts", "eh_proj.weight")] = ("BF16", [H, 2 * H])
    folder = write_headers(tmp_path / "in", {"model.safetensors": fused() | extra}, CONFIG)
    plan = plan_of(tmp_path, folder, "linear")
    assert {copy.source for shard in plan.shards for copy in shard.copies} == set(extra)
    assert len(plan.experts) == 2


def test_layers_beyond_the_last_are_set_aside_only_in_stacks_with_experts(tmp_path):
    extra = {
        "model.conformer.layers.7.proj.weight": ("BF16", [64, 64]),
        "model.layers.7.eh_proj.weight": ("BF16", [64, 64]),
    }
    folder = write_headers(tmp_path / "in", {"model.safetensors": fused() | extra}, CONFIG)
    plan = plan_of(tmp_path, folder, "linear")
    (copy,) = (copy for shard in plan.shards for copy in shard.copies)
    assert (copy.source, copy.reason) == ("model.layers.7.eh_proj.weight", "multi-token prediction")


def test_sizes_come_from_the_text_model_not_from_its_neighbours(tmp_path):
    """Qwen3-Omni: the talker's layers are named before the thinker's in the config."""
    text = {k: v for k, v in CONFIG.items() if k != "model_type"}
    config = {
        "model_type": "qwen3_omni_moe",
        "talker_config": {"code_predictor_config": {"num_hidden_layers": 1}, "num_experts": 99},
        "thinker_config": {"text_config": text, "vision_config": {"hidden_size": 7}},
    }
    tensors = {
        name.replace("model.", f"{part}.model."): info
        for part in ("thinker", "talker")
        for name, info in (split(0) | split(1)).items()
    }
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    plan = plan_of(tmp_path, folder)
    prefix = "thinker.model.layers.{}.mlp.experts"
    assert [e.output for e in plan.experts] == [prefix.format(0), prefix.format(1)]
    assert list(plan.kept) == ["speech generation part"]


RENAMED = {
    "ernie4_5_moe": ("mlp.gate.moe_statics.bias", "mlp.moe_statics.bias"),
    "mimo_v2_flash": ("self_attn.sinks", "self_attn.attention_sink_bias"),
    "laguna": ("mlp.shared_experts.up_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "exaone_moe": ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
}


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_renamed_siblings_come_back_in_every_layer(tmp_path, name, layer):
    """Also in dense layers, here layer 2."""
    theirs, original = (f"model.layers.{layer}.{rest}" for rest in RENAMED[name])
    tensors = fused() | {theirs: ("BF16", [64, 64])}
    config = CONFIG | {"model_type": name, "num_hidden_layers": 3}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    names = {t.name for shard in plan_of(tmp_path, folder).shards for t in shard.tensors}
    assert original in names
    assert theirs not in names


def test_a_bias_that_a_release_keeps_under_experts(tmp_path):
    tensors = split() | {PREFIX.format(0) + ".e_score_correction_bias": ("F32", [E])}
    config = CONFIG | {"model_type": "laguna"}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    assert len(plan_of(tmp_path, folder).experts) == 1


@pytest.mark.parametrize(
    "module",
    [
        *(
            "model.embed_tokens",
            "model.embed_tokens_per_layer",
            "lm_head",
            "model.layers.0.mlp.gate",
        ),
        "model.layers.0.ple.ple_embedding.ngram_embedding.shard_3",
        *("model.layers.0.router.proj", "model.layers.0.mlp.gate.wg", "model.visual.merger.mlp.0"),
        *("model.layers.0.mlp.shared_expert_gate", "model.layers.0.linear_attn.in_proj_ba"),
        *("model.layers.0.self_attn.indexer.wq_b", "model.norm", "audio_tower.layers.0.fc1"),
    ],
)
def test_what_is_no_linear_layer(tmp_path, module):
    tensors = fused() | {f"{module}.weight": ("BF16", [64, 64])}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    (copy,) = (
        copy for shard in plan_of(tmp_path, folder, "linear").shards for copy in shard.copies
    )
    assert copy.source == f"{module}.weight"


@pytest.mark.parametrize(
    ("parent", "leaves"),
    [
        ("self_attn", ["q_proj", "k_proj", "v_proj"]),
        ("self_attn", ["q_a_proj", "kv_a_proj_with_mqa"]),
        ("self_attn.0", ["q_a_proj", "kv_a_proj_with_mqa"]),
        ("self_attn", ["q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"]),
        ("mixer", ["q_proj", "k_proj", "v_proj"]),
        ("linear_attn", ["in_proj_qkv", "in_proj_z"]),
        ("mlp.shared_expert", ["gate_proj", "up_proj"]),
        ("feed_forward", ["w1", "w3"]),
    ],
)
def test_linears_that_runtimes_fuse_share_an_amax(tmp_path, parent, leaves):
    """And no other does: each has a neighbour that reads something else."""
    names = [f"model.layers.0.{parent}.{leaf}" for leaf in leaves]
    apart = [f"model.layers.1.{parent}.{leaves[0]}", f"model.layers.0.{parent}.out_proj"]
    tensors = {f"{name}.weight": ("BF16", [32, 64]) for name in names + apart}
    experts = fused(gate_up=(E, 64, H), down=(E, H, 32))
    config = CONFIG | {"moe_intermediate_size": 32}
    folder = write_headers(tmp_path / "in", {"model.safetensors": experts | tensors}, config)
    plan = moe_ckpt.make_plan(folder, quantize="linear")
    slabs = {made.modules for shard in plan.shards for job in shard.jobs for made in job.outputs}
    assert tuple(names) in slabs
    assert all((name,) in slabs for name in apart)


def test_the_layer_count_is_that_of_the_level_with_the_experts(tmp_path):
    text = {k: v for k, v in CONFIG.items() if k != "model_type"}
    config = {"model_type": "qwen3_5_moe", "draft_config": {"num_hidden_layers": 1}}
    config |= {"text_config": text}
    folder = write_headers(tmp_path / "in", {"model.safetensors": fused()}, config)
    assert len(plan_of(tmp_path, folder).experts) == 2


def test_missing_layers_are_a_warning(tmp_path):
    folder = write_headers(
        tmp_path / "in", {"model.safetensors": fused()}, CONFIG | {"num_hidden_layers": 5}
    )
    warning = plan_of(tmp_path, folder).warnings[0]
    assert warning == "model.layers: 3 of 5 layers are not in the checkpoint: 2, 3, 4"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8"])
@pytest.mark.parametrize("quantize", ["experts", "linear"])
def test_weights_that_are_codes_are_refused_everywhere(tmp_path, dtype, quantize):
    tensors = fused() | {"model.layers.0.self_attn.q_proj.weight": (dtype, [64, 64])}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    with pytest.raises(CheckpointError, match=rf"q_proj\.weight {dtype} \[64, 64\] has no scale"):
        plan_of(tmp_path, folder, quantize)


def test_integer_matrices_are_kept_and_excluded(tmp_path):
    tensors = fused() | {"model.layers.0.self_attn.q_proj.weight": ("I64", [64, 64])}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    plan = plan_of(tmp_path, folder, "linear")
    ignored = json.loads(plan.files["config.json"])["quantization_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignored


@pytest.mark.parametrize("name", ["model.weight", "mlp.weight", ".weight"])
def test_names_that_no_exclude_list_can_tell_apart(tmp_path, name):
    """vLLM looks for an entry anywhere in a name: "mlp" would exclude all experts."""
    tensors = fused() | {name: ("BF16", [64, 64])}
    assert "exclude list" in refusal(tmp_path, tensors)[0]


def test_names_with_the_characters_of_patterns(tmp_path):
    tensors = fused() | {"a(*[.weight": ("BF16", [64, 64])}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    ignored = json.loads(plan_of(tmp_path, folder).files["config.json"])["quantization_config"]
    assert "a(*[" in ignored["ignore"]
