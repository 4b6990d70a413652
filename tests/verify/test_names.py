"""What a verification says of names that runtimes do not read."""

from __future__ import annotations

import struct

import pytest
from kit.files import FIXTURES
from kit.tampering import Tensor, add, copy, edit_json, tensors_of, write_shard
from kit.verified import NVFP4, one

import moe_ckpt
from moe_ckpt.source.checkpoint import INDEX
from moe_ckpt.verify import verify
from moe_ckpt.verify.findings import ERROR, WARNING


def rename(folder, name_of):
    path = folder / "model.safetensors"
    write_shard(path, {name_of(name): tensor for name, tensor in tensors_of(path).items()})


def test_modules_under_two_names(tmp_path):
    folder = copy(NVFP4, tmp_path)
    path = folder / "model.safetensors"
    tensors = tensors_of(path)
    twice = {
        n.replace("model.", "model.language_model."): t
        for n, t in tensors.items()
        if ".layers." in n
    }
    write_shard(path, tensors | twice)
    found = [f for f in verify(folder).found if "two names" in f.problem]
    assert len(found) == 1
    assert found[0].grade == ERROR
    assert found[0].where.startswith("model.language_model.layers.0.")
    assert f"({len(twice)} tensors" in found[0].problem


@pytest.mark.parametrize(
    ("name_of", "where", "words"),
    [
        (lambda n: f"_orig_mod.{n}", "_orig_mod.", "wrapped the model"),
        (lambda n: n.replace("model.", "model.model."), "model.model.", "look for model.layers"),
        (lambda n: n.replace("q_proj", "q_proj.lora_A"), "model.", "adapter"),
        (lambda n: n.replace("q_proj.weight", "q_proj.weight_orig"), "model.", "PyTorch computes"),
    ],
)
def test_names_that_no_runtime_reads(tmp_path, name_of, where, words):
    folder = copy(NVFP4, tmp_path)
    rename(folder, name_of)
    findings = verify(folder)
    assert not any(runtime.loads for runtime in findings.runtimes)
    found = [f for f in findings.found if words in f.problem]
    assert len(found) == 1
    assert found[0].where.startswith(where)
    assert found[0].grade == ERROR


def test_a_head_of_another_kind_is_a_warning(tmp_path):
    folder = copy(NVFP4, tmp_path)
    add(folder, "value_head.weight", "BF16", (64,), bytes(128))
    findings = verify(folder)
    assert one(findings, "value_head.weight").grade == WARNING
    assert findings.is_clean


def test_packed_experts_in_one_tensor_are_named(tmp_path):
    folder = copy(NVFP4, tmp_path)
    path = folder / "model.safetensors"
    tensors = {n: t for n, t in tensors_of(path).items() if ".experts." not in n}
    write_shard(path, tensors)
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    add(folder, f"{prefix}_packed", "I32", (8, 64, 16), bytes(8 * 64 * 64))
    add(folder, f"{prefix}_scale", "BF16", (8, 64, 1), bytes(8 * 64 * 2))
    finding = one(verify(folder), f"{prefix}_packed")
    assert "fused in one tensor" in finding.problem
    assert "one by one" in finding.problem


PLACES = ("self_attn.{0}_scale", "self_attn.{0}_proj.{0}_scale", "self_attn.qkv_proj.{0}_scale")


@pytest.mark.parametrize("place", PLACES)
def test_scales_of_a_kv_cache_in_every_place(tmp_path, place):
    folder = copy(NVFP4, tmp_path)
    for layer in (0, 1):
        for z in "kv":
            name = f"model.layers.{layer}.{place.format(z)}"
            add(folder, name, "F32", (), struct.pack("<f", 0.1))
    for file, part in (
        ("config.json", "quantization_config"),
        ("hf_quant_config.json", "quantization"),
    ):
        edit_json(
            folder / file, lambda said, part=part: said[part].update(kv_cache_quant_algo="FP8")
        )
    findings = verify(folder)
    assert findings.is_clean, findings.found
    assert [f.grade for f in findings.found] == ([WARNING] if "qkv" in place else [])
    missing = f"model.layers.1.{place.format('v')}"
    path = folder / "model.safetensors"
    write_shard(path, {n: t for n, t in tensors_of(path).items() if n != missing})
    assert "is missing beside" in one(verify(folder), missing).problem


def test_a_name_that_vllm_does_not_know_is_said_before_and_after(tmp_path):
    """vLLM stops at what no module has, SGLang leaves it out; a plan knows that, too."""
    source = copy(FIXTURES / "qwen3_moe" / "hub", tmp_path)
    path = next(iter(sorted(source.glob("*.safetensors"))))
    head = Tensor("BF16", (1, 64), bytes(range(128)))
    write_shard(path, tensors_of(path) | {"value_head.weight": head})
    (source / INDEX).unlink()
    plan = moe_ckpt.make_plan(source, format="nvfp4")
    assert plan.runtimes == ("SGLang", "TensorRT-LLM")
    assert any("value_head.weight" in verdict.why_not for verdict in plan.verdicts)
    moe_ckpt.convert(source, tmp_path / "out", format="nvfp4", device="cpu")
    loads = [runtime.name for runtime in verify(tmp_path / "out").runtimes if runtime.loads]
    assert loads == ["SGLang", "TensorRT-LLM"]
