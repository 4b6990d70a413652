"""Models around a text model: the text model's row says how its experts are stored."""

from __future__ import annotations

import json

import pytest
import torch
from kit.command import run_here
from kit.expert_layouts import load, matrices_of, pack, write
from kit.files import FIXTURES, read_json, write_headers

import moe_ckpt
from moe_ckpt.layouts import detect
from moe_ckpt.layouts.wrappers import WRAPPERS, family_of_config
from moe_ckpt.source.checkpoint import open_source

HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
SERVERS = ("vLLM", "SGLang")
E, I, H = 4, 32, 64
NAMES = ("gate_proj", "up_proj", "down_proj")


def config_of(model_type, inner, part):
    sizes = {"num_hidden_layers": 1, "hidden_size": H, "moe_intermediate_size": I}
    sizes |= {"model_type": inner, "num_experts": E, "first_k_dense_replace": 0}
    vision = {"vision_config": {"model_type": "clip", "hidden_size": 8}}
    named = {} if model_type is None else {"model_type": model_type}
    return named | {"architectures": ["Some"], part: sizes} | vision


def make(folder, config, root, layout="split"):
    """One layer of experts at the root; the matrices [(gate, up, down), ...]."""
    matrices = matrices_of(E, I, H)
    module = f"{root}layers.0.mlp.experts"
    if layout == "split":
        tensors = {
            f"{module}.{e}.{leaf}.weight": matrix
            for e, expert in enumerate(matrices)
            for leaf, matrix in zip(NAMES, expert, strict=True)
        }
    else:
        packed = pack(layout, "concat", matrices)
        tensors = dict(zip((f"{module}.gate_up_proj", f"{module}.down_proj"), packed, strict=True))
    tensors[f"{root}layers.0.mlp.gate.weight"] = torch.ones(E, H).bfloat16()
    tensors["vision_tower.proj.weight"] = torch.ones(8, 8).bfloat16()
    write(folder, tensors, config)
    return matrices


@pytest.mark.parametrize(
    ("model_type", "inner", "part", "root", "written", "loads"),
    [
        ("mistral3", "deepseek_v3", "text_config", *["language_model.model."] * 2, True),
        (
            "mistral3",
            "qwen3_moe",
            "text_config",
            "model.language_model.",
            "language_model.model.",
            1,
        ),
        (
            "internvl",
            "qwen3_moe",
            "text_config",
            "model.language_model.",
            "language_model.model.",
            1,
        ),
        ("internvl_chat", "qwen3_moe", "llm_config", *["language_model.model."] * 2, True),
        ("kimi_vl", "deepseek_v3", "text_config", *["language_model.model."] * 2, True),
        (None, "qwen3_moe", "text_config", *["model.language_model."] * 2, False),
        (None, "qwen3_moe", "llm_config", *["language_model.model."] * 2, False),
        (None, "deepseek_v2", "language_config", *["language.model."] * 2, False),
    ],
)
@pytest.mark.parametrize("layout", ["split", "fused"])
def test_the_text_model_counts(tmp_path, model_type, inner, part, root, written, loads, layout):
    config = config_of(model_type, inner, part)
    matrices = make(tmp_path / "in", config, root, layout=layout)
    done = run_here("convert", tmp_path / "in", tmp_path / "out", "--format", "bf16")
    assert done.returncode == 0, done.stderr
    found = load(tmp_path / "out")
    for e, expert in enumerate(matrices):
        for leaf, matrix in zip(NAMES, expert, strict=True):
            assert found[f"{written}layers.0.mlp.experts.{e}.{leaf}.weight"].equal(matrix)
    assert "vision_tower.proj.weight" in found
    assert read_json(tmp_path / "out" / "config.json")["vision_config"] == config["vision_config"]
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4")
    assert {"vLLM", "SGLang"} & {*plan.runtimes} if loads else not plan.runtimes
    assert ("names no model_type" in done.stderr) == (model_type is None)
    assert run_here("verify", tmp_path / "out", "--source", tmp_path / "in").returncode == 0


def test_other_projections_and_paths(tmp_path):
    config = config_of("NemotronH_Nano_VL_V2", "nemotron_h", "llm_config")
    root, leaves = "language_model.backbone.", ("up_proj", "down_proj")
    tensors = {
        f"{root}layers.0.mixer.experts.{e}.{leaf}.weight": matrix
        for e, (_, *expert) in enumerate(matrices_of(E, I, H))
        for leaf, matrix in zip(leaves, expert, strict=True)
    }
    write(tmp_path / "in", tensors, config)
    plan = moe_ckpt.make_plan(tmp_path / "in", format="nvfp4")
    assert plan.family == "nemotron_h"
    assert plan.runtimes == ("vLLM", "SGLang")


def test_roots_of_a_wrapper_are_beneath_it(tmp_path):
    for wrapper in WRAPPERS:
        for model_type in wrapper.model_types:
            family = family_of_config(config_of(model_type, "qwen3_moe", "text_config"))
            assert family.roots == ("language_model.model.",)
    config = config_of("kimi_vl", "deepseek_v3", "text_config")
    make(tmp_path / "in", config, "language_model.model.")
    source = open_source(tmp_path / "in")
    assert detect(source.tensors, source.config).family.roots == ("language_model.model.",)


@pytest.mark.parametrize(
    ("model_type", "inner", "part"),
    [
        ("unheard_of", "qwen3_moe", "text_config"),
        ("internvl_chat", "unheard_of", "llm_config"),
        ("internvl_chat", None, "llm_config"),
        (None, None, "text_config"),
        (None, "qwen3_moe", "vision_config"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, model_type, inner, part):
    config = config_of(model_type, inner, part)
    make(tmp_path / "in", config, "language_model.model.")
    done = run_here("convert", tmp_path / "in", tmp_path / "out", "--format", "bf16")
    assert done.returncode == 3
    assert "is not in the table of families" in done.stderr


@pytest.mark.parametrize("model_type", ["bailing_hybrid", "sarvam_moe", "dots3_note", "sarvam_mla"])
def test_servers_know_the_architecture_of_the_release(tmp_path, model_type):
    """transformers saves another name for the same model, which vLLM and SGLang do not have."""
    family = family_of_config({"model_type": model_type})
    saved = {"model_type": model_type, "architectures": ["SavedByTransformers"]}
    released = saved | {"architectures": [family.released_as[0]]}
    assert {"vLLM", "SGLang"} <= {*family_of_config(released).runtimes} == {*family.runtimes}
    assert family_of_config(saved).runtimes == ("transformers",)


@pytest.mark.parametrize("name", ["bailing_hybrid", "dots3_note"])
def test_what_loads_of_a_model_that_transformers_names_otherwise(tmp_path, name):
    """Only in bf16: what is quantized and what is not is said in the checkpoint's names."""
    saved = HEADERS[name]["A"]
    released = family_of_config({"model_type": name}).released_as[0]
    for architecture, servers in ((saved["config"]["architectures"][0], ()), (released, SERVERS)):
        config = saved["config"] | {"architectures": [architecture]}
        folder = tmp_path / architecture
        write_headers(folder / "in", {"model.safetensors": saved["header"]}, config)
        for number_format, runtimes in (
            ("bf16", (*servers, "transformers")),
            ("fp8-channel", servers),
        ):
            out = folder / number_format
            done = run_here("convert", folder / "in", out, "--format", number_format)
            assert done.returncode == 0, done.stderr
            assert ("config.json names an architecture" in done.stderr) == (not servers)
            document = json.loads(run_here("verify", out, "--json").stdout)
            loads = [found["name"] for found in document["runtimes"] if found["loads"]]
            assert loads == list(runtimes)
