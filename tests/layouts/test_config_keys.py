"""Keys of config.json that transformers leaves out and runtimes ask for, through the command.

Each config.json is what transformers writes; what is expected is what releases have, and what
vLLM 0.33 and SGLang 0.5.23 load.
"""

from __future__ import annotations

import json

import pytest
from kit.command import run_here
from kit.files import FIXTURES, read_json, write_headers

HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
SAVED_BY_TRANSFORMERS = {
    "qwen3_next": {"full_attention_interval": 2},
    "qwen3_5_moe_text": {"full_attention_interval": 3},
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "deepseek_v32": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "glm4_moe_lite": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
    "minimax_m2": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "rotary_dim": 16,
    },
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "hy_v3": {
        "first_k_dense_replace": 1,
        "route_norm": True,
        "qk_norm": True,
        "expert_hidden_dim": 24,
    },
    "granitemoehybrid": {"layers_block_type": ["attention", "mamba"]},
    "exaone_moe": {"is_moe_layer": [True, True]},
    "qwen3_moe": {},
    "mixtral": {},
}
QWEN = "qwen3_next"


def convert(tmp_path, model_type, without=(), **changed):
    """The command's output and the config.json it wrote, and the source's."""
    saved = HEADERS[model_type]["A"]
    config = {**saved["config"], **changed}
    header = {
        name: info
        for name, info in saved["header"].items()
        if not any(part in name for part in without)
    }
    folder = write_headers(tmp_path / "in", {"model.safetensors": header}, config)
    done = run_here("convert", folder, tmp_path / "out", "--format", "bf16")
    assert done.returncode == 0, done.stderr
    return done.stderr, read_json(tmp_path / "out" / "config.json"), config


def added(found, config):
    assert {key: value for key, value in found.items() if key in config} == config
    return {key: value for key, value in found.items() if key not in config}


@pytest.mark.parametrize("model_type", SAVED_BY_TRANSFORMERS)
def test_keys_come_back_and_are_told(tmp_path, model_type):
    said, found, config = convert(tmp_path, model_type)
    wanted = SAVED_BY_TRANSFORMERS[model_type]
    assert added(found, config) == wanted
    assert all(f"{key} {json.dumps(value)}" in said for key, value in wanted.items())
    assert ("gets back keys" in said) == bool(wanted)
    assert "does not tell" not in said
    checked = run_here("verify", tmp_path / "out", "--source", tmp_path / "in")
    assert checked.returncode == 0, checked.stdout


def test_keys_go_to_the_part_that_they_describe(tmp_path):
    _, found, config = convert(tmp_path, "qwen3_5_moe")
    assert added(found["text_config"], config["text_config"]) == {"full_attention_interval": 3}
    assert added(found["vision_config"], config["vision_config"]) == {
        "deepstack_visual_indexes": []
    }
    assert found.keys() == config.keys()
    _, found, config = convert(tmp_path / "kimi", "kimi_k25")
    assert added(found["text_config"], config["text_config"]).keys() == {
        *("topk_method", "scoring_func", "moe_layer_freq")
    }


def test_what_is_there_is_not_touched(tmp_path):
    there = {"topk_method": "greedy", "scoring_func": "softmax", "moe_layer_freq": 2}
    said, found, config = convert(tmp_path, "deepseek_v3", **there)
    assert found == config
    assert "gets back keys" not in said


@pytest.mark.parametrize(
    ("kinds", "interval"),
    [
        ("lllf", 4),
        ("lfl", 2),
        ("ff", 1),
        ("ll", 3),
        ("lffl", None),
        ("fll", None),
        ("llfllflf", None),
    ],
)
def test_the_interval_of_full_attention(tmp_path, kinds, interval):
    """None: the layers have no interval, and the user is told."""
    words = {"l": "linear_attention", "f": "full_attention"}
    said, found, _ = convert(tmp_path, QWEN, layer_types=[words[kind] for kind in kinds])
    assert found.get("full_attention_interval") == interval
    assert ("lacks full_attention_interval (SGLang asks for it)" in said) == (interval is None)


@pytest.mark.parametrize("layer_types", [None, [], "full_attention", [1, 2], [None]])
def test_a_config_that_does_not_tell(tmp_path, layer_types):
    said, found, _ = convert(tmp_path, QWEN, layer_types=layer_types)
    assert "full_attention_interval" not in found
    assert "take it from the config.json of the release" in said


def test_a_router_without_bias_needs_no_method(tmp_path):
    _, found, config = convert(tmp_path, "deepseek_v3", without=["e_score_correction_bias"])
    assert added(found, config).keys() == {"scoring_func", "moe_layer_freq"}


def test_dense_layers_between_others_have_no_number(tmp_path):
    kinds = ["sparse", "dense"]
    said, found, _ = convert(tmp_path, "glm4_moe_lite", mlp_layer_types=kinds)
    assert not found.keys() & {"first_k_dense_replace", "moe_layer_freq"}
    assert "lacks first_k_dense_replace (vLLM and SGLang ask for it), moe_layer_freq" in said


@pytest.mark.parametrize(
    ("rope", "dim"), [({"partial_rotary_factor": 0.5}, 8), ({}, 16), (None, None), ([], None)]
)
def test_the_rotary_dimension(tmp_path, rope, dim):
    said, found, _ = convert(tmp_path, "minimax_m2", rope_parameters=rope)
    assert found.get("rotary_dim") == dim
    assert ("lacks rotary_dim" in said) == (dim is None)
