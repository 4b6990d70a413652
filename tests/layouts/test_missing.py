"""What a model should have and its checkpoint lacks, and that nothing else is missed."""

from __future__ import annotations

import json
import re

import pytest
from kit.command import run_here
from kit.files import FIXTURES, write_headers

from moe_ckpt.layouts.missing import (
    HEAD,
    LAYERS,
    MTP,
    OUTSIDE,
    PART,
    PARTIAL,
    stacks_of,
    what_is_missing,
)
from moe_ckpt.layouts.table import find_family

HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
MODELS = [name for name in HEADERS if find_family(name)]
# What transformers announces and does not save.
WITHOUT_MTP = {"deepseek_v3", "glm4_moe", "kimi_k25", "deepseek_v4", "bailing_hybrid"}
# Two layers of two kinds, or most of it is no text model.
FEW_SISTERS = {"bailing_hybrid", "beam", "lara_mini", "deepseek_ocr2", "unlimited_ocr", "hy_v4_vl"}
FEW_SISTERS |= {"inkling2", "inkling2_loop", "mistral_large4", "muse_spark"}
# No part of any other layer has these, so that nobody can miss them in a model of two layers.
ALONE = {
    "qwen3_next": r"linear_attn|self_attn",
    "glm4_moe_lite": r"gate.e_score_correction_bias",
    "granitemoehybrid": r"mamba|self_attn",
    "ernie4_5_vl_moe": r"gate.weight_1|gate.weight$|moe_statics",
    "diffusion_gemma": r"self_attn|model\.decoder\.(norm|self_conditioning)|encoder",
    "gemma4": r"v_proj",
    "hy_v3": r"expert_bias",
    "step3p7": r"moe\.(gate\.|router_bias)|moe\.",
    "lfm2_moe": r"\.conv\.|self_attn",
    "nemotron_h": r"mixer",
    "kimi_linear": r"e_score_correction_bias|mlp.gate|block_sparse_moe.gate",
    "axk1": r"post_mlp_layernorm",
    "axk2": r"e_score_correction_bias|post_attention_layernorm",
    "zaya": r"router_states_scale|input_hidden",
    "deepseek_v4": r"hc_head|attn_sink",
    "glm5_next": r"hc_ffn|e_score_correction_bias",
    "hy_v4": r"hc_|indexer|e_score_correction_bias",
    "inkling_mm_model": r"embed",
    "qwen4_exp": r"hyper_connection_mixer.input",
    "qwen4_exp_text": r"hyper_connection_mixer.input",
    "qwen3_vl_moe": r"lm_head",
    "phimoe": r"norm\.bias$",
}
NOT_TEXT = r"visual|vision|audio|talker|code2wav|projector|resampler|patch_merge"


def lacks(name, drop=(), mode="A", **config):
    saved = HEADERS[name][mode]
    names = list(saved["header"])
    kept = [tensor for tensor in names if tensor not in drop]
    family = find_family(name)
    stacks = stacks_of(names) or frozenset({"model.layers"})
    return what_is_missing(kept, saved["config"] | config, family, stacks)


@pytest.mark.parametrize("mode", "AB")
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_missing_from_what_transformers_saves(name, mode):
    kinds = [lack.kind for lack in lacks(name, mode=mode)]
    assert kinds == ([MTP] if name in WITHOUT_MTP else [])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FEW_SISTERS])
def test_every_tensor_is_missed_that_a_sister_has(name):
    header = HEADERS[name]["A"]["header"]
    passed_over = re.compile(
        rf"{NOT_TEXT}|experts|moe\.(gate|up|down)_proj|input_linear|output_linear"
    )
    before = lacks(name)
    alone = re.compile(ALONE.get(name, "^$"))
    missed = [
        tensor
        for tensor in header
        if not passed_over.search(tensor)
        and not alone.search(tensor)
        and lacks(name, {tensor}) == before
    ]
    assert missed == []


@pytest.mark.parametrize("mode", ["experts", "all"])
def test_a_layer_of_which_nothing_or_no_experts_are_there(mode):
    drop = {
        tensor
        for tensor in HEADERS["qwen3_moe"]["A"]["header"]
        if ".layers.1." in tensor and (mode == "all" or ".experts." in tensor)
    }
    (lack,) = lacks("qwen3_moe", drop)
    where = "model.layers" + ".1.mlp.experts" * (mode == "experts")
    assert (lack.where, lack.kind) == (where, LAYERS if mode == "all" else PART)
    assert lack.may_be_meant == (mode == "all")


@pytest.mark.parametrize(
    ("drop", "kind"),
    [
        ("lm_head.weight", HEAD),
        ("model.norm.weight", OUTSIDE),
        ("model.embed_tokens.weight", OUTSIDE),
    ],
)
def test_what_is_beside_the_layers(drop, kind):
    assert [lack.kind for lack in lacks("qwen3_moe", {drop})] == [kind]


def test_a_head_that_is_the_embedding_is_not_missed():
    assert lacks("qwen3_moe", {"lm_head.weight"}, tie_word_embeddings=True) == []
    assert lacks("qwen3_moe", {"lm_head.weight"}, architectures=["Qwen3MoeModel"]) == []


def test_layers_alone_are_no_whole_model():
    drop = {name for name in HEADERS["qwen3_moe"]["A"]["header"] if ".layers." not in name}
    assert [lack.kind for lack in lacks("qwen3_moe", drop)] == [PARTIAL]


@pytest.mark.parametrize(
    ("key", "there"),
    [
        ("num_nextn_predict_layers", "model.layers.2.eh_proj.weight"),
        ("mtp_num_hidden_layers", "mtp.layers.0.enorm.weight"),
        ("num_mtp_layers", "model.mtp.layers.0.enorm.weight"),
    ],
)
def test_announced_layers_for_multi_token_prediction(key, there):
    saved = HEADERS["qwen3_moe"]["A"]
    config = saved["config"] | {key: 1}
    family = find_family("qwen3_moe")
    (lack,) = what_is_missing(saved["header"], config, family)
    assert (lack.where, lack.kind) == (f"config.json: {key}", MTP)
    there = [there.replace("eh_proj", part) for part in ("eh_proj", "enorm", "hnorm")]
    assert what_is_missing([*saved["header"], *there], config, family) == []


def test_some_of_several_layers_for_multi_token_prediction():
    saved = HEADERS["deepseek_v3"]["A"]
    config = saved["config"] | {"num_nextn_predict_layers": 2}
    own = [f"model.layers.2.{part}.weight" for part in ("eh_proj", "enorm", "hnorm")]
    names = [*saved["header"], *own]
    (lack,) = what_is_missing(names, config, find_family("deepseek_v3"))
    assert lack.problem.endswith("not there: 3")


@pytest.mark.parametrize(
    "gone",
    [
        *("self_attn.kv_a_layernorm.weight", "input_layernorm.weight", "mlp.gate.weight"),
        *("mlp.experts", "eh_proj.weight", "hnorm.weight", "shared_head.norm.weight"),
    ],
)
def test_a_part_of_a_layer_for_multi_token_prediction(gone):
    saved = HEADERS["deepseek_v3"]["A"]
    config = saved["config"] | {"num_nextn_predict_layers": 1}
    last = "model.layers.1."
    parts = [name.removeprefix(last) for name in saved["header"] if name.startswith(last)]
    own = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head")
    parts += [f"{name}.weight" for name in own]
    family = find_family("deepseek_v3")
    names = [*saved["header"], *(f"model.layers.2.{part}" for part in parts)]
    assert what_is_missing(names, config, family) == []
    there = [name for name in names if not name.startswith(f"model.layers.2.{gone}")]
    (lack,) = what_is_missing(there, config, family)
    assert (lack.where, lack.kind) == (f"model.layers.2.{gone}", MTP)


def test_a_layer_for_multi_token_prediction_of_another_kind_is_not_compared():
    saved = HEADERS["deepseek_v3"]["A"]
    config = saved["config"] | {"num_nextn_predict_layers": 1}
    parts = ["self_attn.qkv_proj.weight", "mlp.w1.weight", "norm.weight"]
    names = [*saved["header"], *(f"model.layers.2.{part}" for part in parts)]
    assert what_is_missing(names, config, find_family("deepseek_v3")) == []


def test_scales_and_codes_of_a_weight_are_the_weight():
    names = list(HEADERS["qwen3_moe"]["A"]["header"])
    stored = [
        part
        for name in names
        for part in (
            (f"{name}_packed", f"{name}_scale", f"{name.removesuffix('weight')}input_scale")
            if ".layers.1." in name and "proj" in name
            else (name,)
        )
    ]
    config = HEADERS["qwen3_moe"]["A"]["config"]
    assert what_is_missing(stored, config, find_family("qwen3_moe")) == []


def alternating(config, parts, count=8):
    """Layers of a hybrid model: what is told of a layer by its number."""
    names = [f"model.layers.{n}.{part}" for n in range(count) for part in parts(n)]
    for n in range(count):
        names += [f"model.layers.{n}.mlp.{part}.weight" for part in ("experts.0.up_proj", "gate")]
    return what_is_missing(names, config | {"num_hidden_layers": count}, None)


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["linear", "full"] * 4},
        {"full_attn_layers": [2, 4, 6, 8], "of": "layers counted from 1"},
        {"hybrid_override_pattern": "M*M*M*M*"},
        {"layer_group_size": 2},
    ],
    ids=str,
)
def test_config_json_says_which_layers_are_alike(config):
    def parts(n):
        return ["self_attn.o_proj.weight", *(["self_attn.g_norm.weight"] if n % 2 else [])]

    assert alternating(config, parts) == []
    assert len(alternating({}, parts)) == 4
    gone = alternating(config, lambda n: parts(n if n != 3 else 0))
    assert [lack.where for lack in gone] == ["model.layers.3.self_attn.g_norm.weight"]


def test_what_modules_compute_for_themselves_is_not_missed():
    """Some layers are saved with their rotary frequencies."""
    parts = (
        ["self_attn.o_proj.weight"],
        ["self_attn.o_proj.weight", "self_attn.rotary_emb.inv_freq"],
    )
    assert alternating({}, lambda n: parts[n != 3]) == []


def test_what_fewer_layers_have_than_lack_is_not_missed():
    parts = ["self_attn.o_proj.weight"], ["self_attn.o_proj.weight", "self_attn.q.weight"]
    assert alternating({}, lambda n: parts[n == 3]) == []


def planned(tmp_path, drop, **config):
    saved = HEADERS["qwen3_moe"]["A"]
    tensors = {
        re.sub(r"layers\.1\.", f"layers.{n}.", name): info
        for n in (1, 2, 3)
        for name, info in saved["header"].items()
    }
    tensors = {name: info for name, info in tensors.items() if not re.search(drop, name)}
    config = saved["config"] | {"num_hidden_layers": 4} | config
    folder = write_headers(tmp_path / "in", {"model.safetensors": tensors}, config)
    return run_here("convert", folder, tmp_path / "out", "--format", "fp8-channel", "--dry-run")


@pytest.mark.parametrize(
    ("drop", "refused"),
    [
        (r"layers\.2\.", "model.layers: 1 of 4 layers are not in the checkpoint: 2"),
        (r"layers\.2\.self_attn\.q_norm", "model.layers.2.self_attn.q_norm.weight: is missing"),
        (r"layers\.2\.self_attn\.", "model.layers.2.self_attn: is missing; 3 other layers"),
        ("lm_head", "lm_head: is missing"),
    ],
)
def test_a_model_with_a_hole_is_refused(tmp_path, drop, refused):
    made = planned(tmp_path, drop)
    assert made.returncode == 3
    assert refused in made.stderr


@pytest.mark.parametrize(
    ("drop", "warned"),
    [
        (r"layers\.[23]\.", "2 of 4 layers are not in the checkpoint: 2, 3"),
        (r"layers\.0\.|embed_tokens", "no embedding"),
        ("^$", ""),
    ],
)
def test_the_first_or_the_last_layers_alone_can_be_meant(tmp_path, drop, warned):
    made = planned(tmp_path, drop)
    assert made.returncode == 0
    assert warned in made.stderr
    assert ("warning: model.layers" in made.stderr) == bool(warned)
