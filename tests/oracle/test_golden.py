"""Our output against ModelOpt's export of the same models, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kit.files import FIXTURES, read_files, read_json, read_tensors

import moe_ckpt
from moe_ckpt.formats import e2m1, e8m0

MODELS = ("qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe")
FUSED = ("llama4", "gpt_oss")  # ModelOpt leaves their experts in one tensor
HUB = ("qwen3_moe", "mixtral")
EXACT = [
    *((model, "nvfp4", "linear", "modelopt-nvfp4") for model in MODELS),
    *((model, "nvfp4", "experts", "modelopt-nvfp4-experts") for model in MODELS),
    ("qwen3_moe", "nvfp4-w4a16", "linear", "modelopt-nvfp4-w4a16"),
    *((model, "nvfp4", "linear", "modelopt-nvfp4") for model in FUSED),
]


def convert(tmp_path, model, number_format, quantize, *, form="source"):
    stats = [] if number_format == "nvfp4-w4a16" else [FIXTURES / model / "stats.json"]
    out = tmp_path / f"{model}-{form}"
    moe_ckpt.convert(
        FIXTURES / model / form,
        out,
        stats=stats,
        format=number_format,
        quantize=quantize,
        experts="fused" if model in FUSED else "split",
    )
    return out


@pytest.mark.parametrize(("model", "number_format", "quantize", "export"), EXACT)
def test_nvfp4_equals_modelopt(tmp_path, model, number_format, quantize, export):
    ours = read_tensors(convert(tmp_path, model, number_format, quantize))
    theirs = read_tensors(FIXTURES / model / export)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name] == tensor, name


@pytest.mark.parametrize("model", HUB)
@pytest.mark.parametrize(
    ("number_format", "quantize"), [("nvfp4", "linear"), ("fp8-tensor", "experts")]
)
def test_hub_form_gives_the_bytes_of_the_fused_form(tmp_path, model, number_format, quantize):
    fused = convert(tmp_path, model, number_format, quantize)
    split = convert(tmp_path, model, number_format, quantize, form="hub")
    assert read_tensors(fused) == read_tensors(split)
    for name in ("config.json", "hf_quant_config.json"):
        assert (fused / name).read_bytes() == (split / name).read_bytes()


@pytest.mark.parametrize("model", [*MODELS, *FUSED])
def test_fp8_tensor_has_modelopts_scales_and_no_larger_error(tmp_path, model):
    ours = read_tensors(convert(tmp_path, model, "fp8-tensor", "linear"))
    theirs = read_tensors(FIXTURES / model / "modelopt-fp8")
    assert ours.keys() == theirs.keys()
    source = split_source(model)
    our_error = their_error = 0.0
    steps = 0
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.dtype != "F8_E4M3":
            assert ours[name] == tensor, name
            continue
        distance = np.abs(ordinal(ours[name].data) - ordinal(tensor.data))
        assert distance.max() <= 1, name
        steps += int(distance.sum())
        scale_name = f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale"
        scale = torch.frombuffer(bytearray(ours[scale_name].data), dtype=torch.float32)
        our_error += squared_error(ours[name], scale, source[name])
        their_error += squared_error(tensor, scale, source[name])
    assert steps > 0  # else the comparison of errors below says nothing
    assert our_error < their_error


# What vLLM and SGLang ask for; transformers does not save it, and ModelOpt leaves it so.
RESTORED = {"deepseek_v3": ["topk_method", "scoring_func", "moe_layer_freq"]}


@pytest.mark.parametrize(("model", "number_format", "quantize", "export"), EXACT)
def test_config_agrees_with_modelopt(tmp_path, model, number_format, quantize, export):
    out = convert(tmp_path, model, number_format, quantize)
    theirs = FIXTURES / model / export
    ours, wanted = read_json(out / "config.json"), read_json(theirs / "config.json")
    for key in RESTORED.get(model, ()):
        ours.pop(key)
    assert list(ours) == list(wanted)
    ours["quantization_config"].pop("ignore")
    wanted["quantization_config"].pop("ignore")
    assert list(ours["quantization_config"]) == [
        k for k in read_json(theirs / "config.json")["quantization_config"] if k != "ignore"
    ]
    assert ours == wanted

    ours, wanted = (read_json(d / "hf_quant_config.json") for d in (out, theirs))
    excluded = ours["quantization"].pop("exclude_modules")
    wanted["quantization"].pop("exclude_modules")
    assert ours == wanted
    assert excluded == read_json(out / "config.json")["quantization_config"]["ignore"]


# What ModelOpt writes in formats whose spelling or configuration of its own MoE runtimes do not
# read: the numbers are compared, under the names and shapes of ours.
NUMBERS = [
    ("qwen3_moe", "fp8-channel"),
    *(("qwen3_moe_wide", f) for f in ("fp8-channel", "fp8-block", "mxfp8", "mxfp4")),
]


@pytest.mark.parametrize(("model", "number_format"), NUMBERS)
def test_numbers_equal_modelopts(tmp_path, model, number_format):
    """Every scale, and every code but MXFP4's at exact ties, where ModelOpt rounds to zero."""
    out = tmp_path / "out"
    moe_ckpt.convert(FIXTURES / model / "source", out, format=number_format, quantize="linear")
    ours = read_tensors(out)
    theirs = read_tensors(FIXTURES / model / f"modelopt-{number_format}")
    renamed = {}
    for name, tensor in theirs.items():
        if name.endswith(".weight_scale") and number_format == "fp8-block":
            assert (len(tensor.shape), tensor.shape[1::2]) == (4, (1, 1))
            name = name.replace("weight_scale", "weight_scale_inv")
            tensor = replace(tensor, shape=tensor.shape[::2])
        elif name.endswith(".weight_scale") and number_format == "fp8-channel":
            tensor = replace(tensor, shape=(*tensor.shape, 1))
        elif name.endswith(".weight") and tensor.dtype == "U8":
            name = name.replace("weight", "weight_packed")
        renamed[name] = tensor
    assert ours.keys() == renamed.keys()
    differing = ties = 0
    for name, tensor in renamed.items():
        if ours[name] == tensor:
            continue
        assert number_format == "mxfp4", name
        assert name.endswith(".weight_packed"), name
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        found, wanted = (e2m1.decode(as_torch(t)) for t in (ours[name], tensor))
        scale = as_torch(ours[name.replace("_packed", "_scale")])
        source = split_source(model)[name.replace("_packed", "")]
        exact = source.view(*scale.shape, 32) / e8m0.decode(scale).unsqueeze(-1)
        exact = exact.view(source.shape)
        other = found != wanted
        differing += int(other.sum())
        ties += int(((found + wanted)[other] / 2 == exact[other]).sum())
        assert (wanted.abs() < found.abs())[other].all()
    assert differing == ties
    assert (differing > 0) == (number_format == "mxfp4")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantize", ["experts", "linear"])
def test_nvfp4_is_the_same_in_both_dialects(tmp_path, model, quantize):
    """compressed-tensors' global scales are the reciprocals; every other byte is ModelOpt's."""
    one = read_tensors(convert(tmp_path, model, "nvfp4", quantize))
    out = tmp_path / "out"
    moe_ckpt.convert(
        FIXTURES / model / "source",
        out,
        stats=[FIXTURES / model / "stats.json"],
        quantize=quantize,
        dialect="compressed-tensors",
    )
    two = read_tensors(out)
    assert len(one) == len(two)
    quantized = {name.rpartition(".")[0] for name in one if name.endswith(".weight_scale_2")}
    for name, tensor in one.items():
        module, _, leaf = name.rpartition(".")
        if module not in quantized or leaf in ("weight_scale", "bias"):
            assert two[name] == tensor, name
        elif leaf == "weight":
            assert two[f"{module}.weight_packed"] == tensor
        else:
            theirs = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
            inverse = two[f"{module}.{theirs[leaf]}"]
            assert (inverse.dtype, inverse.shape) == ("F32", (1,))
            assert np.float32(1) / as_torch(tensor).numpy() == as_torch(inverse).numpy()


def as_torch(tensor):
    """Bytes of a tensor as torch sees them; U8 and F32 only."""
    dtype = {"U8": torch.uint8, "F32": torch.float32}[tensor.dtype]
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(tensor.shape)


def test_same_bytes_twice(tmp_path):
    one = convert(tmp_path / "a", "qwen2_moe", "nvfp4", "linear")
    two = convert(tmp_path / "b", "qwen2_moe", "nvfp4", "linear")
    assert read_files(one) == read_files(two)


def split_source(model):
    """The source weights as float32, under the names of the output."""
    found = {}
    block, names = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    if model == "mixtral":
        block, names = ("block_sparse_moe", ("w1", "w3", "w2"))
    for name, tensor in read_tensors(FIXTURES / model / "source").items():
        values = torch.frombuffer(bytearray(tensor.data), dtype=torch.bfloat16)
        values = values.view(tensor.shape).float()
        prefix = name.replace(".mlp.", f".{block}.").rpartition(".")[0]
        if model in FUSED:
            found[name] = values
        elif name.endswith("experts.gate_up_proj"):
            for e, matrix in enumerate(values):
                (
                    found[f"{prefix}.{e}.{names[0]}.weight"],
                    found[f"{prefix}.{e}.{names[1]}.weight"],
                ) = matrix.chunk(2)
        elif name.endswith("experts.down_proj"):
            found |= {f"{prefix}.{e}.{names[2]}.weight": matrix for e, matrix in enumerate(values)}
        else:
            found[name] = values
    return found


def ordinal(data: bytes) -> np.ndarray:
    """E4M3 bytes as integers in the order of their values: neighbours differ by one."""
    codes = np.frombuffer(data, np.uint8).astype(int)
    return np.where(codes < 128, codes, 128 - codes)


def squared_error(tensor, scale, source) -> float:
    codes = torch.frombuffer(bytearray(tensor.data), dtype=torch.float8_e4m3fn)
    return float(((codes.view(tensor.shape).float() * scale - source) ** 2).double().sum())


def test_fused_experts_of_bf16_stay_as_they_are(tmp_path):
    """For gpt-oss that is what runtimes read; none reads it one by one."""
    source = FIXTURES / "gpt_oss" / "source"
    plan = moe_ckpt.convert(source, tmp_path / "out", format="bf16").plan
    assert "vLLM" in plan.runtimes
    assert read_tensors(tmp_path / "out") == read_tensors(source)
