"""What a verification of a checkpoint alone finds in its tensors, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from kit.command import run_cli
from kit.files import FIXTURES, write_headers
from kit.stored_as import ENCODINGS, MXFP4, experts, fused, mxfp4, save
from kit.tampering import copy, delete, float32, poke
from kit.verified import LAYER, NVFP4, UP, but_left_out, converted, one
from kit.whole_plans import CASES

import moe_ckpt
from moe_ckpt.dialects import DIALECTS
from moe_ckpt.errors import CheckpointError, InputError, UsageError
from moe_ckpt.verify import verify

GOLDEN = sorted(FIXTURES.glob("*/modelopt-*"))
LLM_COMPRESSOR = FIXTURES / "qwen3_moe" / "llm-compressor-nvfp4a16"


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_exports_of_modelopt_are_clean(folder):
    findings = verify(folder)
    assert but_left_out(findings) == []
    assert findings.counts["scales"] > 0
    assert findings.skipped.keys() == {"source"}


@pytest.mark.parametrize(
    ("model", "row", "quantize", "form"),
    CASES,
    ids=[f"{m}-{row.name}-{q}-{e}" for m, row, q, e in CASES],
)
def test_conversions_are_clean_in_every_dialect(tmp_path, model, row, quantize, form):
    made = 0
    for dialect in DIALECTS:
        options = {"dialect": dialect.name, "quantize": quantize, "experts": form}
        try:
            out = converted(tmp_path / dialect.name, model, row.name, **options)
        except (InputError, UsageError):
            continue
        made += 1
        findings = verify(out)
        assert but_left_out(findings) == [], dialect.name
        assert row.name == "bf16" or findings.counts[f"matrices in {row.name}"]
    assert made


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_conversions_with_a_kv_cache_in_many_shards_are_clean(tmp_path, model, dialect):
    options = {"kv_cache": "fp8", "max_shard_size": "60KB", "form": "hub", "dialect": dialect}
    findings = verify(converted(tmp_path, model, "nvfp4", **options))
    assert findings.found == []
    assert findings.counts["shards"] > 1
    assert findings.counts["digests"] > findings.counts["shards"]


def test_a_mix_of_formats_is_clean(tmp_path):
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "{}"\nformat = "{}"\n'
    recipe.write_text(
        rule.format("model.layers.0.*", "keep")
        + rule.format("*.experts.*", "nvfp4")
        + rule.format("*.self_attn.*", "fp8-tensor")
    )
    stats = [FIXTURES / "qwen3_moe" / "stats.json"]
    source = FIXTURES / "qwen3_moe" / "source"
    moe_ckpt.convert(source, tmp_path / "out", recipe=recipe, stats=stats, device="cpu")
    findings = verify(tmp_path / "out")
    assert findings.found == []
    assert findings.counts["matrices in nvfp4"]
    assert findings.counts["matrices in fp8-tensor"]


def stored(folder, name):
    """Experts in an encoding that others write, and a router, of whatever numbers."""
    encode, options, said, _ = ENCODINGS[name]
    shared = {"shared_amax": True} if "nvfp4" in name else {}
    tensors, _ = experts(encode, 4, 128, 256, **shared, **options)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(4, 256, dtype=torch.bfloat16)
    key = "modules_to_not_convert" if said["quant_method"] in ("fp8", "mxfp8") else "ignore"
    said = said | {key: ["lm_head", "model.layers.0.mlp.gate"]}
    return save(folder, tensors, said, count=4, i=128, h=256)


@pytest.mark.parametrize(
    "name",
    [
        *("fp8-block-F32", "fp8-block-BF16", "fp8-block-ct", "fp8-tensor-1d", "fp8-channel-bf16"),
        *("mxfp8-inv", "mxfp8-ct", "nvfp4-modelopt-1d", "nvfp4-ct-a16", "mxfp4-ct", "int8"),
        *("int4-g32", "int4-g64-f16", "int4-g128-f32"),
    ],
)
def test_what_others_write_is_clean(tmp_path, name):
    findings = verify(stored(tmp_path / "in", name))
    assert findings.found == []
    assert findings.counts["scales"] >= 12


def test_scales_of_rows_without_a_second_dimension_are_found(tmp_path):
    found = one(verify(stored(tmp_path / "in", "int8-1d")), f"{LAYER}.0.up_proj.weight_scale")
    assert found.problem == "has shape [128]; compressed-tensors has [128, 1]"


def test_experts_of_gpt_oss_as_they_are_released_are_clean(tmp_path):
    tensors, _ = fused(mxfp4, 4, 128, 256, interleaved=True, blocks=True)
    for leaf, size in (("gate_up_proj_bias", 256), ("down_proj_bias", 256)):
        tensors[f"{LAYER}.{leaf}"] = torch.zeros(4, size, dtype=torch.bfloat16)
    folder = save(tmp_path / "in", tensors, MXFP4, count=4, i=128, h=256, model_type="gpt_oss")
    findings = verify(folder)
    assert findings.found == []
    assert all(runtime.loads for runtime in findings.runtimes)
    poke(folder, f"{LAYER}.down_proj_scales", b"\xff", 300)
    assert "scale is nan at [0, 75, 0]" in one(verify(folder), f"{LAYER}.down_proj_scales").problem
    delete(folder, f"{LAYER}.down_proj_scales")
    assert "is missing" in one(verify(folder), f"{LAYER}.down_proj_scales").problem


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "gpt_oss", "llama4"])
def test_sources_are_clean(model):
    assert verify(FIXTURES / model / "source").found == []


def test_scales_of_llm_compressor_differ_between_gate_and_up():
    findings = verify(LLM_COMPRESSOR)
    assert {finding.part for finding in findings.found} == {"scales"}
    found = one(findings, f"{LAYER}.0.up_proj.weight_global_scale")
    assert f"{LAYER}.0.gate_proj.weight_global_scale" in found.problem
    assert "vLLM uses gate's for both" in found.effect
    assert len(findings.found) == 14  # of 16 experts two happen to be equal
    refused = {runtime.name: runtime.why_not for runtime in findings.runtimes}
    assert "differ between gate and up" in refused["SGLang"]


def test_a_folder_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(tmp_path / "nowhere")


def test_a_scale_of_zero_bytes_of_disk_is_found_everywhere(tmp_path):
    """Many findings stay cheap, and are cut short for people only."""
    tensors = {}
    for expert in range(64):
        for projection, n, k in (("gate", 64, 128), ("up", 64, 128), ("down", 128, 64)):
            name = f"{LAYER}.{expert}.{projection}_proj"
            tensors[f"{name}.weight"] = ("F8_E4M3", [n, k])
            tensors[f"{name}.weight_scale"] = ("F32", [n, 1])
    tensors["model.layers.0.mlp.gate.weight"] = ("BF16", [64, 128])
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 64,
        "moe_intermediate_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
                }
            },
        },
    }
    folder = write_headers(tmp_path / "zeros", {"model.safetensors": tensors}, config)
    findings = verify(folder)
    assert len(findings.found) == 64 * 3
    done = run_cli("verify", folder)
    assert done.returncode == 6
    assert "and 172 more" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_reports_and_exits_with_6(tmp_path, as_json):
    folder = copy(NVFP4, tmp_path)
    poke(folder, f"{UP}.weight_scale_2", float32(0.25))
    done = run_cli("verify", folder, *(["--json"] if as_json else []))
    assert done.returncode == 6
    lines = done.stderr.splitlines()
    assert lines[0] == "WRONG     scales: 1 finding"
    assert lines[1].startswith(f"  {UP}.weight_scale_2: is 0.25, and ")
    assert lines[2].startswith("  then      vLLM uses gate's for both")
    assert lines[-1] == f"moe-ckpt: error: {folder}: 1 finding: 1 on scales"
    if not as_json:
        assert done.stdout == ""
        return
    document = json.loads(done.stdout)
    assert document["schema"] == "moe-ckpt/verification"
    assert document["is_clean"] is False
    (found,) = document["findings"]
    assert found["part"] == "scales"
    assert found["where"] == f"{UP}.weight_scale_2"
    assert [runtime["name"] for runtime in document["runtimes"] if runtime["loads"]] == [
        "vLLM",
        "SGLang",
        "TensorRT-LLM",
    ]
    assert document["counts"]["scales"] == 168
    assert document["skipped"] == {"source": "no --source was given"}


def test_the_command_exits_with_0_if_nothing_is_wrong():
    done = run_cli("verify", NVFP4)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("nothing is wrong\n")
    assert done.stdout == ""
    assert run_cli("verify", NVFP4, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("/nowhere",), 3, "is not a folder"),
        (("",), 2, "is empty"),
        ((NVFP4, "--all"), 2, "--source"),
        ((NVFP4, "--sample", "3"), 2, "--source"),
        ((NVFP4, "--sample", "0", "--source", NVFP4), 2, "--sample"),
        ((NVFP4, "--sample", "3", "--all", "--source", NVFP4), 2, "one of them"),
    ],
)
def test_usage_of_the_command(args, code, text):
    done = run_cli("verify", *args)
    assert done.returncode == code
    assert text in done.stderr


def test_importing_it_loads_no_numpy_and_no_torch():
    code = (
        "import sys, moe_ckpt, moe_ckpt.verify;"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
