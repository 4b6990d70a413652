"""Whether verify notices that half a model is no model."""

from __future__ import annotations

import re

import pytest
from kit.files import FIXTURES
from kit.tampering import copy, delete, tensors_of, write_shard
from kit.verified import NVFP4, one

from moe_ckpt.verify import verify
from moe_ckpt.verify.findings import ERROR, WARNING

SHARD = "model.safetensors"


def without(tmp_path, pattern, folder=NVFP4):
    made = copy(folder, tmp_path)
    kept = {n: t for n, t in tensors_of(made / SHARD).items() if not re.search(pattern, n)}
    write_shard(made / SHARD, kept)
    return made


@pytest.mark.parametrize(
    ("pattern", "where"),
    [
        (r"layers\.1\.", "model.layers"),
        (r"layers\.1\.self_attn\.", "model.layers.1.self_attn"),
        (r"layers\.1\.self_attn\.k_proj\.", "model.layers.1.self_attn.k_proj.weight"),
        (r"layers\.0\.input_layernorm", "model.layers.0.input_layernorm"),
        (r"layers\.1\.mlp\.gate", "model.layers.1.mlp.gate.weight"),
        (r"layers\.1\.mlp\.experts", "model.layers.1.mlp.experts"),
        (r"layers\.1\.mlp", "model.layers.1.mlp"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_part_that_is_gone_is_an_error(tmp_path, pattern, where):
    assert one(verify(without(tmp_path, pattern)), where).grade == ERROR


def test_of_layers_alone_it_is_said_that_they_are_no_model(tmp_path):
    findings = verify(without(tmp_path, r"embed_tokens|^model.norm|lm_head"))
    assert findings.found == []
    assert "only layers are there" in findings.skipped["whole model"]


@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "llama4", "mixtral", "qwen2_moe"])
def test_every_kind_of_tensor_is_missed(tmp_path, model):
    source = FIXTURES / model / "modelopt-nvfp4"
    before = len(verify(source).of_grade(ERROR))
    names = list(tensors_of(source / SHARD))
    # The last layer is one with experts; a bias of a router that no other layer has is not missed.
    last = max(
        int(match[1]) for match in map(re.compile(r".*\.layers\.(\d+)\.").match, names) if match
    )
    inside = [n for n in names if f".layers.{last}." in n and ".experts." not in n]
    inside = [n for n in inside if not re.search(r"router\.bias|e_score_correction_bias", n)]
    kinds = sorted({re.sub(r"\.(weight\w*|input_scale)$", "", name) for name in inside})
    for kind in kinds:
        folder = without(tmp_path / kind, rf"^{re.escape(kind)}(\.|$)", source)
        assert len(verify(folder).of_grade(ERROR)) > before, kind


def test_a_layer_for_multi_token_prediction_is_a_warning():
    findings = verify(FIXTURES / "deepseek_v3" / "modelopt-nvfp4")
    assert one(findings, "config.json: num_nextn_predict_layers").grade == WARNING
    assert findings.is_clean


def test_shards_that_are_named_as_of_more(tmp_path):
    folder = copy(NVFP4, tmp_path)
    (folder / SHARD).rename(folder / "model-00001-of-00002.safetensors")
    found = one(verify(folder), "model-00002-of-00002.safetensors")
    assert (found.part, found.grade) == ("structure", ERROR)


def test_a_tensor_that_is_lost_with_its_shard_is_told_once(tmp_path):
    folder = copy(FIXTURES / "mixtral" / "hub", tmp_path)
    delete(folder, "model.layers.1.self_attn.q_proj.weight")
    where = "model.layers.1.self_attn.q_proj.weight"
    assert one(verify(folder), where).problem.startswith("is missing; 1 other layer")
