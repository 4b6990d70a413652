"""Recipes, dialects chosen by them, and what is saved of them."""

from __future__ import annotations

import tomllib

import pytest
import torch
from kit.command import run_cli
from kit.expert_layouts import load
from kit.files import FIXTURES, read_json, read_tensors

import moe_ckpt
from moe_ckpt import RecipeError, UsageError
from moe_ckpt.dialects.matching import built_modules
from moe_ckpt.planning.recipe import KEEP, Recipe, Rule, built_in, read_recipe, recipe_text

SOURCE = FIXTURES / "qwen3_moe" / "source"
STATS = FIXTURES / "qwen3_moe" / "stats.json"
WIDE = FIXTURES / "qwen3_moe_wide"
MIXED = """
[[rule]]
match = "model.layers.0.*"
format = "keep"

[[rule]]
match = "*.experts.*"
format = "nvfp4"

[[rule]]
match = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]
format = "fp8-tensor"
"""


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def refusal(tmp_path, text, **options):
    with pytest.raises(RecipeError) as caught:
        moe_ckpt.make_plan(SOURCE, recipe=recipe_file(tmp_path, text), **options)
    return "\n".join(caught.value.problems)


def rule(match, chosen):
    return f"[[rule]]\nmatch = {match}\nformat = '{chosen}'\n"


def test_the_first_rule_that_matches_counts():
    recipe = Recipe((Rule(("a.*",), KEEP), Rule(("*.x", "b.?"), "nvfp4"), Rule(("*",), "mxfp8")))
    found = {name: recipe.format_of(name) for name in ("a.x", "b.x", "b.y", "c.yy", "q.x")}
    assert found == {"a.x": KEEP, "b.x": "nvfp4", "b.y": "nvfp4", "c.yy": "mxfp8", "q.x": "nvfp4"}
    assert Recipe((Rule(("a",), "nvfp4"),)).format_of("A") == KEEP


def test_a_mixed_recipe_converts_every_module_as_it_says(tmp_path):
    out = tmp_path / "out"
    moe_ckpt.convert(SOURCE, out, recipe=recipe_file(tmp_path, MIXED), stats=[STATS])
    alone = {}
    for number_format in ("nvfp4", "fp8-tensor", "bf16"):
        folder = tmp_path / number_format
        stats = [] if number_format == "bf16" else [STATS]
        moe_ckpt.convert(SOURCE, folder, format=number_format, quantize="linear", stats=stats)
        alone[number_format] = read_tensors(folder)
    ours = read_tensors(out)
    expected = {}
    for number_format, tensors in alone.items():
        for name, tensor in tensors.items():
            wanted = "bf16"
            if not name.startswith("model.layers.0."):
                wanted = "nvfp4" if ".experts." in name else wanted
                wanted = "fp8-tensor" if ".self_attn." in name and "norm" not in name else wanted
            if wanted == number_format:
                expected[name] = tensor
    assert ours == expected

    config = read_json(out / "config.json")["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = config["quantized_layers"]
    algos = {name: info["quant_algo"] for name, info in layers.items()}
    assert {algo for name, algo in algos.items() if name.endswith("experts")} == {"NVFP4"}
    assert {algo for name, algo in algos.items() if "self_attn" in name} == {"FP8"}
    assert not any(name.startswith("model.layers.0.") for name in algos)
    nested = read_json(out / "hf_quant_config.json")["quantization"]
    assert nested["quant_algo"] == "MIXED_PRECISION"
    assert nested["quantized_layers"] == layers


def test_what_is_saved_says_it_of_every_module_and_gives_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    moe_ckpt.convert(SOURCE, one, recipe=recipe_file(tmp_path, MIXED), stats=[STATS])
    saved = one / "moe-ckpt-recipe.toml"
    rules = {rule["format"]: rule["match"] for rule in tomllib.loads(saved.read_text())["rule"]}
    assert "model.layers.0.mlp.experts" in rules["bf16"]
    assert "model.layers.1.mlp.experts" in rules["nvfp4"]
    assert "model.layers.1.self_attn.q_proj" in rules["fp8-tensor"]
    assert all("*" not in name for names in rules.values() for name in names)
    moe_ckpt.convert(SOURCE, two, recipe=saved, stats=[STATS])
    assert read_tensors(one) == read_tensors(two)
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


def test_names_with_the_characters_of_patterns_are_saved_as_themselves(tmp_path):
    path = recipe_file(tmp_path, recipe_text({"nvfp4": ["a[0].*b", "c?"]}))
    recipe = read_recipe(path)
    assert recipe.format_of("a[0].*b") == "nvfp4"
    assert recipe.format_of("c?") == "nvfp4"
    assert recipe.format_of("a0.xb") == recipe.format_of("cc") == KEEP


@pytest.mark.parametrize("quantize", ["experts", "linear"])
def test_quantize_is_a_recipe(tmp_path, quantize):
    pattern = {"experts": "*.experts.*", "linear": "*"}[quantize]
    path = recipe_file(tmp_path, rule(f"'{pattern}'", "nvfp4"))
    plan = moe_ckpt.make_plan(SOURCE, recipe=path)
    built = moe_ckpt.make_plan(SOURCE, format="nvfp4", quantize=quantize)
    assert plan.digest() == built.digest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule", ["is not TOML"]),
        (f"rule = {'9' * 5000}", ["is not TOML", "too many digits"]),
        ("", ["has no [[rule]]"]),
        ("rule = 3", ["has no [[rule]]"]),
        ("[[rule]]\nmatch = 'x'", ["rule 1: must have match and format", "found match"]),
        (rule("'x'", "nvfp4") + "more = 1", ["rule 1", "nothing else", "more"]),
        (rule("[]", "nvfp4"), ["rule 1: match must be a pattern"]),
        (rule("[1]", "nvfp4"), ["rule 1: match holds something that is not a pattern"]),
        (rule("''", "nvfp4"), ["rule 1"]),
        (rule("'*'", "fp3"), ['rule 1: format "fp3" is unknown; choose nvfp4', "or keep"]),
        (rule("'*'", "keep"), ["every rule keeps"]),
        ("version = 1\n" + rule("'*'", "nvfp4"), ["version is unknown"]),
        (rule("'*'", "nvfp4") + rule("'*.w1'", "mxfp8"), ["rule 2: *.w1 matches nothing"]),
        (
            rule("'*.experts.*'", "nvfp4") + rule("'lm_head'", "nvfp4"),
            ["rule 2: lm_head matches nothing that can be quantized", "lm_head is never quantized"],
        ),
        (
            rule("'*.experts.1.*'", "nvfp4"),
            ["model.layers.0.mlp.experts: all experts of a layer must have one format"],
        ),
        (
            rule("'*.experts.*.gate_proj'", "nvfp4"),
            ["all experts of a layer must have one format", "up_proj keep"],
        ),
        (
            rule("'*.experts.*'", "nvfp4") + rule("'*.q_proj'", "nvfp4"),
            ["q_proj nvfp4", "k_proj keep", "runtimes build these as one module"],
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(tmp_path, text, words):
    found = refusal(tmp_path, text)
    assert "recipe.toml" in found
    for word in words:
        assert word in found, found


def test_all_problems_are_reported_at_once(tmp_path):
    found = refusal(tmp_path, rule("'*.w1'", "nvfp4") + rule("'*.q_proj'", "nvfp4"))
    assert "rule 1: *.w1 matches nothing" in found
    assert "runtimes build these as one module" in found


def test_a_rule_that_keeps_the_head_is_not_an_error(tmp_path):
    text = rule("'lm_head'", "keep") + rule("'*.mlp.gate'", "keep") + rule("'*.experts.*'", "nvfp4")
    assert moe_ckpt.make_plan(SOURCE, recipe=recipe_file(tmp_path, text)).formats == {"nvfp4": 48}


def test_a_rule_behind_one_that_took_all_it_matches_is_not_an_error(tmp_path):
    text = rule("'*'", "nvfp4") + rule("'*.experts.*'", "keep")
    moe_ckpt.make_plan(SOURCE, recipe=recipe_file(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "x", "format": "nvfp4"}, "--recipe says what --format"),
        ({"recipe": "x", "quantize": "linear"}, "--recipe says what --format"),
        ({"format": "fp8-block", "dialect": "modelopt"}, "modelopt does not write fp8-block"),
        ({"format": "mxfp4", "dialect": "modelopt"}, "choose compressed-tensors"),
        ({"format": "nvfp4", "dialect": "fp8"}, "fp8 does not write nvfp4"),
        ({"format": "nvfp4", "dialect": "gguf"}, "dialect 'gguf' is unknown; choose modelopt"),
        ({"format": "nvfp4", "quantize": "all"}, "--quantize 'all' is unknown"),
        ({"format": "fp8-tensor"}, "needs --stats FILE"),
        ({"kv_cache": "fp8"}, "give --stats FILE"),
        ({"kv_cache": "int8"}, "--kv-cache 'int8' is unknown"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(UsageError, match=words):
        moe_ckpt.make_plan(SOURCE, **options)


def test_fp8_experts_without_nvfp4_do_not_mix_in_modelopts_dialect(tmp_path):
    """SGLang would take such a file for another kind: compressed-tensors can say it."""
    text = rule("'*.experts.*'", "mxfp8") + rule("'*'", "fp8-tensor")
    options = {"recipe": recipe_file(tmp_path, text), "stats": [WIDE / "stats.json"]}
    assert moe_ckpt.make_plan(WIDE / "source", **options).dialect == "compressed-tensors"
    with pytest.raises(UsageError, match="modelopt does not write"):
        moe_ckpt.make_plan(WIDE / "source", **options, dialect="modelopt")


def test_kept_experts_are_written_one_by_one_and_excluded(tmp_path):
    out = tmp_path / "out"
    moe_ckpt.convert(SOURCE, out, recipe=recipe_file(tmp_path, MIXED), stats=[STATS])
    kept, source = load(out), load(SOURCE)
    gate_up = source["model.layers.0.mlp.experts.gate_up_proj"]
    for e, matrix in enumerate(gate_up):
        gate, up = matrix.chunk(2)
        assert torch.equal(kept[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"], gate)
        assert torch.equal(kept[f"model.layers.0.mlp.experts.{e}.up_proj.weight"], up)
    ignored = read_json(out / "config.json")["quantization_config"]["ignore"]
    assert any("layers.0" in entry and "experts" in entry for entry in ignored)
    assert built_modules(["a.q_proj"])  # the rules behind the list are in tests/test_matching.py


def test_the_built_in_recipes_name_routed_experts_only():
    recipe = built_in("experts", "nvfp4")
    assert recipe.format_of("model.layers.0.mlp.experts.12.up_proj") == "nvfp4"
    assert recipe.format_of("model.layers.0.mlp.shared_experts.up_proj") == KEEP
    assert recipe.format_of("model.layers.0.mlp.shared_expert.up_proj") == KEEP


def test_the_command_line_takes_a_recipe(tmp_path):
    path = recipe_file(tmp_path, MIXED)
    done = run_cli("convert", SOURCE, tmp_path / "out", "--recipe", path, "--stats", STATS)
    assert done.returncode == 0, done.stderr
    assert "24 matrices nvfp4" in done.stderr
    done = run_cli("convert", SOURCE, tmp_path / "o", "--recipe", tmp_path / "nothing")
    assert (done.returncode, "No such file" in done.stderr) == (3, True)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_a_recipe_that_keeps_everything_is_refused(tmp_path, dialect):
    """Its other rules match, and come too late."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[rule]]\nmatch = "model.layers.*"\nformat = "keep"\n'
        '[[rule]]\nmatch = "*.experts.*"\nformat = "nvfp4"\n'
        '[[rule]]\nmatch = "*.self_attn.*"\nformat = "fp8-tensor"\n'
    )
    model = FIXTURES / "qwen3_moe"
    with pytest.raises(moe_ckpt.RecipeError, match="keeps all that can be quantized"):
        moe_ckpt.make_plan(
            model / "source", recipe=recipe, dialect=dialect, stats=[model / "stats.json"]
        )
