"""Conversions to be verified, and the one finding that a test expects."""

from __future__ import annotations

import json

from kit.files import FIXTURES

import moe_ckpt
from moe_ckpt.formats import find_format

NVFP4 = FIXTURES / "qwen3_moe" / "modelopt-nvfp4"
STACKED = FIXTURES / "gpt_oss" / "modelopt-nvfp4"
LAYER = "model.layers.0.mlp.experts"
EXPERT = f"{LAYER}.3"
UP = f"{EXPERT}.up_proj"
KV = ("k_proj", "v_proj")


def converted(tmp_path, model, name, **options):
    """Our conversion of a fixture."""
    stats = [FIXTURES / model / "stats.json"] if find_format(name).input_scale else []
    if options.get("kv_cache") == "fp8":
        stats.append(with_outputs(tmp_path, model))
    out = tmp_path / f"{model}-{name}"
    source = FIXTURES / model / options.pop("form", "source")
    moe_ckpt.convert(source, out, format=name, stats=stats, device="cpu", **options)
    return out


def with_outputs(folder, model):
    """Statistics of what k_proj and v_proj put out."""
    text = (FIXTURES / model / "source" / "config.json").read_text()
    attention = [
        f"model.layers.{layer}.self_attn" for layer in range(json.loads(text)["num_hidden_layers"])
    ]
    modules = {f"{a}.{p}": {"input_amax": 8, "output_amax": 9} for a in attention for p in KV}
    file = folder / "outputs.json"
    file.write_text(json.dumps({"schema": "moe-ckpt/stats", "version": 1, "modules": modules}))
    return file


def one(findings, where):
    """The finding about a tensor, module or file."""
    found = [finding for finding in findings.found if finding.where == where]
    assert found, [finding[:3] for finding in findings.found]
    return found[0]


def but_left_out(findings):
    """All findings but those of DeepSeek as transformers saves it, without a layer and keys."""
    left_out = ("(MTP), none is there", "lacks topk_method", "lacks scoring_func")
    left_out += ("lacks moe_layer_freq",)
    return [found for found in findings.found if not any(w in found.problem for w in left_out)]
