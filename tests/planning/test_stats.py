"""Statistics files: what is accepted, what is refused, and which scale each module gets."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.files import write_headers
from safetensors.torch import load_file

import moe_ckpt
from moe_ckpt.errors import StatsError
from moe_ckpt.planning.stats import read_stats

E, I, H = 3, 32, 48
EXPERTS = "model.layers.0.mlp.experts"
ATTENTION = "model.layers.0.self_attn"

# The model of these tests has no more.
ONLY_LAYERS = (
    "config.json: is that of a whole model; only layers are there, or experts, and no embedding"
)


def stats_file(folder, modules, name="stats.json", **top):
    path = folder / name
    document = {"schema": "moe-ckpt/stats", "version": 1, "modules": modules} | top
    path.write_text(json.dumps(document))
    return path


def amaxes(**modules):
    return {name.replace("__", "."): {"input_amax": amax} for name, amax in modules.items()}


@pytest.fixture
def model(tmp_path):
    tensors = {
        f"{EXPERTS}.gate_up_proj": ("BF16", [E, 2 * I, H]),
        f"{EXPERTS}.down_proj": ("BF16", [E, H, I]),
        **{f"{ATTENTION}.{p}_proj.weight": ("BF16", [H, H]) for p in "qkvo"},
    }
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H, "num_hidden_layers": 1}
    return write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)


def input_amaxes(plan):
    """Module -> input amax, None for the constant scale."""
    return {
        module: job.input_amax
        for shard in plan.shards
        for job in shard.jobs
        for output in job.outputs
        for module in output.modules
    }


def expert_amaxes(plan):
    found = input_amaxes(plan)
    gate_up = {found[f"{EXPERTS}.{e}.{p}_proj"] for e in range(E) for p in ("gate", "up")}
    down = {found[f"{EXPERTS}.{e}.down_proj"] for e in range(E)}
    assert len(gate_up) == len(down) == 1
    return gate_up.pop(), down.pop()


@pytest.mark.parametrize(
    "gate_up",
    [
        {f"{EXPERTS}.gate_up_proj": 6.0},
        {f"{EXPERTS}.gate_up_proj": [1.0, 6.0, 2.0]},
        {f"{EXPERTS}.0.gate_proj": 2.0, f"{EXPERTS}.1.up_proj": 6.0, f"{EXPERTS}.2.up_proj": 1},
        {f"{EXPERTS}.gate_up_proj": [6.0, None, 0], f"{EXPERTS}.1.gate_proj": 3.0},
    ],
)
def test_all_experts_of_a_layer_get_the_largest(tmp_path, model, gate_up):
    modules = gate_up | {f"{EXPERTS}.down_proj": [0.5, 0.25, 0.125]}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    assert expert_amaxes(moe_ckpt.make_plan(model, stats=[file])) == (6.0, 0.5)


@pytest.mark.parametrize("unreached", [None, 0, 0.0, 1e-60])
def test_unreached_experts_are_counted(tmp_path, model, unreached):
    modules = {f"{EXPERTS}.gate_up_proj": {"input_amax": [1.0, unreached, unreached]}}
    modules |= {f"{EXPERTS}.down_proj": {"input_amax": [1.0, 2.0, unreached]}}
    plan = moe_ckpt.make_plan(model, stats=[stats_file(tmp_path, modules)])
    assert expert_amaxes(plan) == (1.0, 2.0)
    (warning,) = plan.warnings
    assert warning.startswith("3 expert projections in 2 places saw no tokens")
    assert "more data" in warning


def test_files_merge_by_maximum(tmp_path, model):
    one = stats_file(
        tmp_path,
        {
            f"{EXPERTS}.gate_up_proj": {"input_amax": [1.0, None, 3.0]},
            f"{EXPERTS}.down_proj": {"input_amax": 1.0},
        },
    )
    two = stats_file(
        tmp_path,
        {
            f"{EXPERTS}.gate_up_proj": {"input_amax": [2.0, 4.0, None]},
            f"{EXPERTS}.down_proj": {"input_amax": [None, 0.5, None]},
        },
        "two.json",
    )
    for files in ([one, two], [two, one]):
        plan = moe_ckpt.make_plan(model, stats=files)
        assert expert_amaxes(plan) == (4.0, 1.0)
        assert not plan.warnings


def test_linears_that_read_the_same_input_share(tmp_path, model):
    modules = {f"{EXPERTS}.gate_up_proj": 1, f"{EXPERTS}.down_proj": 1}
    modules |= {f"{ATTENTION}.q_proj": 2, f"{ATTENTION}.v_proj": 5, f"{ATTENTION}.o_proj": 3}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    found = input_amaxes(moe_ckpt.make_plan(model, stats=[file], quantize="linear"))
    assert [found[f"{ATTENTION}.{p}_proj"] for p in "qkvo"] == [5, 5, 5, 3]


def test_a_layer_without_statistics_is_an_error_or_constant(tmp_path, model):
    file = stats_file(tmp_path, {f"{EXPERTS}.gate_up_proj": {"input_amax": [None] * E}})
    with pytest.raises(StatsError) as caught:
        moe_ckpt.make_plan(model, stats=[file], quantize="linear")
    assert len(caught.value.problems) == 4  # gate_up, down, q/k/v, o
    assert all("--missing-stats constant" in problem for problem in caught.value.problems)

    plan = moe_ckpt.make_plan(model, stats=[file], missing_stats="constant")
    assert expert_amaxes(plan) == (None, None)
    assert "input scale 1.0" in plan.warnings[0]
    moe_ckpt.convert(model, tmp_path / "out", stats=[file], missing_stats="constant")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if name.endswith("input_scale")]
    assert len(scales) == 3 * E
    assert all(torch.equal(scale, torch.tensor(1.0)) for scale in scales)


def test_without_statistics_every_input_scale_is_one(tmp_path, model):
    plan = moe_ckpt.make_plan(model, quantize="linear")
    assert set(input_amaxes(plan).values()) == {None}
    assert plan.notes == (ONLY_LAYERS,)
    (warning,) = plan.warnings_by_kind["statistics"]
    assert "no statistics: every quantized module gets input scale 1.0" in warning


def test_statistics_of_kept_modules_are_fine_and_of_strangers_are_not(tmp_path, model):
    modules = {f"{EXPERTS}.gate_up_proj": 1, f"{EXPERTS}.down_proj": 1, f"{ATTENTION}.q_proj": 1}
    modules |= {"model.layers.7.mlp.experts.down_proj": 1, f"{ATTENTION}.k_proj.weight": 1}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    (warning,) = moe_ckpt.make_plan(model, stats=[file]).warnings
    assert 'stats.json: modules["model.layers.7.mlp.experts.down_proj"].input_amax' in warning
    assert "k_proj.weight" in warning
    assert "q_proj" not in warning


def test_the_file_with_the_wrong_count_is_named(tmp_path, model):
    good = {f"{EXPERTS}.gate_up_proj": {"input_amax": 1}, f"{EXPERTS}.down_proj": {"input_amax": 1}}
    one = stats_file(tmp_path, good)
    two = stats_file(tmp_path, {f"{EXPERTS}.down_proj": {"input_amax": [1, 2]}}, "two.json")
    with pytest.raises(StatsError, match=r"^two\.json: .*2 entries"):
        moe_ckpt.make_plan(model, stats=[one, two])


def test_a_weight_only_format_still_reads_its_statistics(tmp_path, model):
    with pytest.raises(StatsError, match="No such file"):
        moe_ckpt.make_plan(model, stats=[tmp_path / "nothing"], format="nvfp4-w4a16")


def test_unknown_keys_are_noted(tmp_path, model):
    modules = {f"{EXPERTS}.gate_up_proj": {"input_amax": 1, "median": 2}}
    modules |= {f"{EXPERTS}.down_proj": {"input_amax": 1, "num_tokens": 7}}
    file = stats_file(tmp_path, modules, num_tokens=9, made_by="x")
    plan = moe_ckpt.make_plan(model, stats=[file])
    ignored = "stats.json: keys unknown to this version were ignored: made_by, median"
    assert plan.notes == (ignored, ONLY_LAYERS)


def test_statistics_are_not_used_by_weight_only_formats(tmp_path, model):
    file = stats_file(tmp_path, {"model.x": {"input_amax": 1}})
    plan = moe_ckpt.make_plan(model, stats=[file], format="nvfp4-w4a16")
    assert "statistics are not used" in plan.notes[0]


@pytest.mark.parametrize(
    ("amax", "where", "what"),
    [
        ("NaN", "", "is NaN"),
        ("Infinity", "", "too large"),
        ("-Infinity", "", "-inf"),
        ("-1.0", "", "-1.0"),
        ('"6.5"', "", "a string"),
        ("true", "", "true or false"),
        ("{}", "", "an object"),
        ("[]", "", "empty list"),
        ("1e400", "", "too large"),
        ("1e39", "", "expected a finite"),
        ("1" + "0" * 400, "", "too large"),
        ("[1, 2]", "", "2 entries, the layer has 3"),
        ("[1, -2, 3]", "[1]", "-2"),
        ("[1, 2, true]", "[2]", "true or false"),
        ("[1, [2], 3]", "[1]", "a list"),
    ],
)
def test_bad_values_are_refused_with_their_path(tmp_path, model, amax, where, what):
    path = tmp_path / "stats.json"
    path.write_text(
        f'{{"schema": "moe-ckpt/stats", "version": 1, "modules": {{"{EXPERTS}.down_proj": '
        f'{{"input_amax": {amax}}}, "{EXPERTS}.gate_up_proj": {{"input_amax": 1}}}}}}'
    )
    with pytest.raises(StatsError) as caught:
        moe_ckpt.make_plan(model, stats=[path])
    (problem,) = caught.value.problems
    assert problem.startswith("stats.json")
    assert what in problem
    assert f'modules["{EXPERTS}.down_proj"].input_amax{where}:' in problem


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "schema"),
        ('{"schema": "moe-ckpt/stats", "version": 2, "modules": {"a": {}}}', "version is 2"),
        ('{"schema": "moe-ckpt/stats", "version": true, "modules": {"a": {}}}', "version"),
        ('{"schema": "moe-ckpt/stats", "version": 1}', "found null"),
        ('{"schema": "moe-ckpt/stats", "version": 1, "modules": []}', "found a list"),
        ('{"schema": "moe-ckpt/stats", "version": 1, "modules": {}}', "empty"),
        ('{"schema": "moe-ckpt/stats", "version": 1, "modules": {"a": 1}}', 'modules["a"]'),
        ('{"schema": "moe-ckpt/stats", "version": 1, "version": 1, "modules": {}}', "twice"),
        (
            '{"schema": "moe-ckpt/stats", "modules": {"a": {"input_amax": 1, "input_amax": 2}}}',
            'modules["a"]["input_amax"] appears twice',
        ),
        (
            '{"schema": "moe-ckpt/stats", "version": 1, "modules": {"a": {"num_tokens": -1}}}',
            'modules["a"].num_tokens',
        ),
        ("[" * 100_000, "nested"),
        ("\xff", "not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path, model, text, what):
    path = tmp_path / "stats.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StatsError, match=r"stats\.json") as caught:
        moe_ckpt.make_plan(model, stats=[path])
    assert what in str(caught.value)


def test_a_list_for_one_matrix_is_refused(tmp_path, model):
    modules = {
        f"{EXPERTS}.gate_up_proj": {"input_amax": 1},
        f"{EXPERTS}.down_proj": {"input_amax": 1},
    }
    modules |= {f"{ATTENTION}.{p}_proj": {"input_amax": 1} for p in "qkv"}
    modules |= {f"{ATTENTION}.o_proj": {"input_amax": [1, 2, 3]}}
    with pytest.raises(StatsError, match="one matrix has one number"):
        moe_ckpt.make_plan(model, stats=[stats_file(tmp_path, modules)], quantize="linear")


AMAX = st.none() | st.floats(0, 2.0**120, width=32)


@given(
    st.lists(st.lists(AMAX, min_size=2, max_size=2) | AMAX, min_size=1, max_size=4), st.randoms()
)
def test_merging_is_the_same_in_any_order(tmp_path_factory, entries, random):
    folder = tmp_path_factory.mktemp("stats")
    files = [
        stats_file(folder, {"m": {"input_amax": amax}}, f"{n}.json")
        for n, amax in enumerate(entries)
    ]
    merged = read_stats(files).input_amax["m"]
    random.shuffle(files)
    assert read_stats([*files, files[0]]).input_amax["m"] == merged


def test_names_of_transformers_count_for_the_original_release(tmp_path):
    """Statistics are taken where transformers runs the model, under its own names."""
    tensors = {"model.layers.0.mlp.shared_mlp.up_proj.weight": ("BF16", [H, H])}
    for e in range(E):
        for name, shape in (("gate", [I, H]), ("up", [I, H]), ("down", [H, I])):
            tensors[f"{EXPERTS}.{e}.{name}_proj.weight"] = ("BF16", shape)
    config = {"model_type": "hy_v3", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H, "num_hidden_layers": 1}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    modules = {f"{EXPERTS}.gate_up_proj": 2, f"{EXPERTS}.down_proj": 3}
    modules |= {"model.layers.0.mlp.shared_experts.up_proj": 4}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    plan = moe_ckpt.make_plan(folder, stats=[file], quantize="linear")
    assert not plan.warnings_by_kind["statistics"]
    assert expert_amaxes(plan) == (2, 3)
    assert input_amaxes(plan)["model.layers.0.mlp.shared_mlp.up_proj"] == 4


def test_names_of_transformers_count_where_it_changes_the_prefix(tmp_path):
    """Nemotron-H: `model.` in transformers, `backbone.` in the release and in runtimes."""
    prefix = "backbone.layers.0.mixer.experts"
    tensors = {
        f"{prefix}.{e}.{name}.weight": ("BF16", shape)
        for e in range(4)
        for name, shape in (("up_proj", [32, 64]), ("down_proj", [64, 32]))
    }
    config = {"model_type": "nemotron_h", "n_routed_experts": 4}
    config |= {"moe_intermediate_size": 32, "hidden_size": 64}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    modules = {
        f"model.layers.0.mixer.experts.{name}": {"input_amax": amax}
        for name, amax in (("up_proj", 3.0), ("down_proj", [None, 0.5, 0.25, 0]))
    }
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"schema": "moe-ckpt/stats", "version": 1, "modules": modules}))
    plan = moe_ckpt.make_plan(folder, stats=[stats])
    assert [job.input_amax for shard in plan.shards for job in shard.jobs] == [3.0, 0.5]
    assert plan.stats_covered == plan.quantized_matrices == 8


def test_a_list_covers_all_groups_of_experts(tmp_path):
    """ERNIE-VL: the vision experts are numbered behind the text experts."""
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.{e}.{name}_proj.weight": ("BF16", shape)
        for e, i in enumerate((32, 32, 16, 16))
        for name, shape in (("gate", [i, 64]), ("up", [i, 64]), ("down", [64, i]))
    }
    config = {"model_type": "ernie4_5_vl_moe", "moe_num_experts": 2, "hidden_size": 64}
    config |= {"moe_intermediate_size": [32, 16], "num_hidden_layers": 1}
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    modules = {f"{prefix}.{name}": [1, 2, None, 4] for name in ("gate_up_proj", "down_proj")}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    plan = moe_ckpt.make_plan(folder, stats=[file])
    assert [job.input_amax for shard in plan.shards for job in shard.jobs] == [2, 2, 4, 4]
    modules = {name: amax[:2] for name, amax in modules.items()}
    file = stats_file(tmp_path, {name: {"input_amax": amax} for name, amax in modules.items()})
    with pytest.raises(StatsError, match="has 2 entries, the layer has 4 experts"):
        moe_ckpt.make_plan(folder, stats=[file])


@pytest.mark.parametrize("is_fused", [True, False])
def test_statistics_of_experts_that_stay_are_not_called_unknown(tmp_path, is_fused):
    """However transformers names them: it holds all experts of a layer in one tensor."""
    tensors = {f"{ATTENTION}.{p}_proj.weight": ("BF16", [H, H]) for p in "qkvo"}
    tensors |= {
        f"{EXPERTS}.{e}.{p}_proj.weight": ("BF16", [H, I] if p == "down" else [I, H])
        for e in range(E)
        for p in ("gate", "up", "down")
    }
    config = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": I}
    config |= {"hidden_size": H, "num_hidden_layers": 1}
    source = write_headers(tmp_path / "split", {"model.safetensors": tensors}, config)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[rule]]\nmatch = "{ATTENTION}.*"\nformat = "nvfp4"\n')
    known = {f"{ATTENTION}.{p}_proj": {"input_amax": 3.0} for p in "qkvo"}
    names = ("gate_up_proj", "down_proj") if is_fused else ("0.up_proj", "2.down_proj")
    known |= {f"{EXPERTS}.{name}": {"input_amax": 5.0} for name in names}
    plan = moe_ckpt.make_plan(source, recipe=recipe, stats=[stats_file(tmp_path, known)])
    assert not [text for text in plan.warnings if "does not have" in text]
    known["model.layers.0.mlp.exports.down_proj"] = {"input_amax": 5.0}
    plan = moe_ckpt.make_plan(source, recipe=recipe, stats=[stats_file(tmp_path, known)])
    assert [text for text in plan.warnings if "exports" in text]
