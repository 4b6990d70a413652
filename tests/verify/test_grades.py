"""What cannot be checked is no fault, and what works is no error: grades and exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from kit.command import run_cli
from kit.files import FIXTURES
from kit.tampering import copy, delete, edit_json, poke, quantization
from kit.verified import LAYER, NVFP4, UP, converted, one
from safetensors.torch import load_file, save_file

from moe_ckpt.source.checkpoint import INDEX
from moe_ckpt.verify import verify
from moe_ckpt.verify.findings import ERROR, UNCHECKED, WARNING

HUB = FIXTURES / "qwen3_moe" / "hub"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def words(**weights):
    """What compressed-tensors says of integers."""
    group = {"targets": ["Linear"], "weights": INT4 | weights, "input_activations": None}
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"} | groups


def packed(bits=4, group=32, **more):
    """A function that packs matrices [N, K] into words, whatever their values."""

    def tensors(name, N, K):
        found = {
            f"{name}.weight_packed": torch.zeros(N, K * bits // 32, dtype=torch.int32),
            f"{name}.weight_scale": torch.ones(N, K // group, dtype=torch.bfloat16),
            f"{name}.weight_shape": torch.tensor([N, K]),
        }
        return found | {f"{name}.{key}": make(N, K) for key, make in more.items()}

    return tensors


def gptq(name, N, K):
    return {
        f"{name}.qweight": torch.zeros(K // 8, N, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(K // 32, N // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(K // 32, N, dtype=torch.float16),
    }


def fp8(name, N, K):
    return {
        f"{name}.weight": torch.ones(N, K).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor(1.0),
    }


def model(folder, said, make):
    """A whole model whose experts are stored as ``make`` says."""
    folder.mkdir()
    tensors = {}
    for shard in sorted(HUB.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            is_expert = ".experts." in name
            tensors |= (
                make(name.removesuffix(".weight"), *tensor.shape) if is_expert else {name: tensor}
            )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((HUB / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


UNREAD = {
    "zero points": (
        words(symmetric=False),
        packed(weight_zero_point=lambda n, k: torch.zeros(n // 8, k // 32, dtype=torch.int32)),
        "with zero points",
    ),
    "act-order": (
        words(actorder="group"),
        packed(weight_g_idx=lambda _n, k: torch.arange(k, dtype=torch.int32) // 32),
        "columns out of order",
    ),
    "8 bits": (words(num_bits=8), packed(8), "packed into words"),
    "8 bits that look like 4": (words(num_bits=8), packed(8, 16), "packed into words"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq, '"gptq"'),
    "awq": ({"quant_method": "awq", "bits": 4}, gptq, '"awq"'),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, gptq, '"auto-round"'),
    "quark": ({"quant_method": "quark"}, fp8, '"quark"'),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, gptq, "W4A8_AWQ"),
    "two formats": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "moe_quant_algo": "NVFP4"},
        fp8,
        "moe_quant_algo NVFP4",
    ),
    "rotated": (words() | {"transform_config": {"config_groups": {"a": 1}}}, packed(), "rotated"),
}


@pytest.mark.parametrize(("said", "make", "text"), UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_is_unchecked_and_nothing_is_said_of_it(tmp_path, said, make, text):
    folder = model(tmp_path / "model", said, make)
    done = run_cli("verify", folder, "--json")
    assert done.returncode == 7, done.stderr
    assert "not all of it can be checked" in done.stderr
    document = json.loads(done.stdout)
    assert [found["grade"] for found in document["findings"]] == [UNCHECKED]
    assert text in document["findings"][0]["problem"]
    assert not document["is_clean"]
    for runtime in document["runtimes"]:
        assert (runtime["loads"], runtime["why_not"]) == (False, "")
        assert text in runtime["unknown"]
    assert not any("int4" in what for what in document["counts"])


def test_words_of_a_form_that_the_tensors_have_not_are_wrong(tmp_path):
    folder = copy(NVFP4, tmp_path)
    quantization(folder, lambda said: said.update(quant_method="gptq"))
    assert run_cli("verify", folder).returncode == 6


def test_dense_weights_are_not_sparse(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "fp8-channel", dialect="compressed-tensors")
    dense = {"sparsity_config": {"format": "dense"}}
    edit_json(out / "config.json", lambda config: config["quantization_config"].update(dense))
    assert not [found for found in verify(out).found if found.grade == UNCHECKED]


def test_a_stale_total_size_is_a_warning(tmp_path):
    out = converted(tmp_path, "qwen3_moe", "nvfp4", max_shard_size="60KB")
    index = json.loads((out / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (out / INDEX).write_text(json.dumps(index))
    (out / ".moe-ckpt").rename(tmp_path / "journal")
    done = run_cli("verify", out)
    assert done.returncode == 0
    assert "Warning   structure: 1 warning" in done.stderr
    assert done.stderr.endswith("nothing is wrong; 1 warning\n")


def test_input_scales_that_differ_are_a_warning(tmp_path):
    folder = copy(NVFP4, tmp_path)
    poke(folder, f"{UP}.input_scale", b"\0\0\0\x3c")
    finding = one(verify(folder), f"{UP}.input_scale")
    assert finding.grade == WARNING
    assert run_cli("verify", folder).returncode == 0


def test_a_missing_scale_is_not_called_a_missing_expert(tmp_path):
    folder = copy(NVFP4, tmp_path)
    delete(folder, f"{UP}.input_scale", f"{LAYER}.2.up_proj.weight_scale")
    for name in (f"{UP}.input_scale", f"{LAYER}.2.up_proj.weight_scale"):
        finding = one(verify(folder), name)
        assert finding.grade == ERROR
        assert "expert that is missing" not in finding.effect


def test_a_missing_expert_is_called_one(tmp_path):
    folder = copy(NVFP4, tmp_path)
    parts = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    delete(folder, *(f"{UP}.{part}" for part in parts))
    assert "expert that is missing" in one(verify(folder), UP).effect


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2"])
def test_the_activation_scale_of_half_a_matrix_is_not_left_over(tmp_path, part):
    folder = copy(NVFP4, tmp_path)
    delete(folder, f"{UP}.{part}")
    assert not [f for f in verify(folder).found if "left over" in f.problem]
    assert one(verify(folder), f"{UP}.{part}").grade == ERROR
