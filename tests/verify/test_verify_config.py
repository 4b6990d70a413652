"""What a verification finds in configuration files, and what each runtime makes of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from kit import stored_as
from kit.files import FIXTURES
from kit.stored_as import CT_CHANNEL, FP8
from kit.tampering import add, change, copy, delete, edit_json, float32, listed, poke, quantization

import moe_ckpt
from moe_ckpt.dialects.matching import Built
from moe_ckpt.dialects.read import read_config
from moe_ckpt.formats import find_format
from moe_ckpt.verify import verify
from moe_ckpt.verify.findings import WARNING

NVFP4 = FIXTURES / "qwen3_moe" / "modelopt-nvfp4"
NVFP4_EXPERTS = FIXTURES / "qwen3_moe" / "modelopt-nvfp4-experts"
W4A16 = FIXTURES / "qwen3_moe" / "modelopt-nvfp4-w4a16"
MXFP8 = FIXTURES / "qwen3_moe_wide" / "modelopt-mxfp8"
LAYER = "model.layers.0.mlp.experts"
ROUTER = "model.layers.0.mlp.gate"
QKV = "model.layers.0.self_attn.qkv_proj"


def finding(folder, where, *texts):
    """The finding of the configuration about something, with these texts in it."""
    found = [f for f in verify(folder).found if f.part == "config"]
    matching = [f for f in found if f.where == where and all(t in f.problem for t in texts)]
    assert matching, [f[1:3] for f in found]
    return matching[0]


def remove(entry):
    return lambda said: listed(said).remove(entry)


def append(*entries):
    return lambda said: listed(said).extend(entries)


def convert(folder, name, dialect, model="qwen3_moe_wide", **options):
    """Our conversion of a fixture, without its journal."""
    stats = [FIXTURES / model / "stats.json"] if find_format(name).input_scale else []
    source = FIXTURES / model / "source"
    out = folder / "out"
    moe_ckpt.convert(
        source, out, format=name, dialect=dialect, stats=stats, device="cpu", **options
    )
    shutil.rmtree(out / ".moe-ckpt")
    return out


@pytest.mark.parametrize(
    ("base", "edit", "where", "texts"),
    [
        (NVFP4, remove("lm_head"), "lm_head", ("not quantized", "vLLM", "it is nvfp4")),
        (NVFP4, remove(ROUTER), ROUTER, ("not quantized", "vLLM", "it is nvfp4")),
        (
            NVFP4_EXPERTS,
            remove("model.layers.0.self_attn*"),
            QKV,
            ("is not quantized", "vLLM, SGLang and TensorRT-LLM read that it is nvfp4"),
        ),
        (NVFP4, append(QKV), QKV, ("is nvfp4", "vLLM and SGLang", "not quantized")),
        (
            NVFP4,
            append("model.layers.0.self_attn.q_proj"),
            QKV,
            ("is nvfp4", "vLLM", "cannot tell"),
        ),
        (NVFP4, append("model.layers.1"), "model.layers.1.mlp.experts", ("is nvfp4", "SGLang")),
        (NVFP4, append("*mlp*"), LAYER, ("is nvfp4", "read that it is not quantized")),
        (NVFP4, append(f"{LAYER}.3.up_proj"), f"{LAYER}.3.up_proj", ("one expert of a layer",)),
        (NVFP4, append(f"{LAYER}.3*"), f"{LAYER}.3*", ("one expert of a layer",)),
        (NVFP4, append(f"{LAYER}.3.up_proj"), LAYER, ("is nvfp4", "vLLM read")),
        (
            NVFP4,
            lambda said: said.update(quant_algo="FP8"),
            LAYER,
            ("is nvfp4", "read that it is fp8-tensor"),
        ),
        (
            NVFP4,
            lambda said: said.update(quant_algo="NVFP5"),
            "config.json: quantization_config",
            ("quant_algo 'NVFP5' is unknown",),
        ),
        (
            W4A16,
            lambda said: said.update(quant_algo="MXFP8"),
            LAYER,
            ("is nvfp4-w4a16", "it is mxfp8"),
        ),
        (
            NVFP4,
            lambda said: said.update(group_size=32),
            "hf_quant_config.json",
            ("group_size is 32",),
        ),
        (
            NVFP4,
            lambda said: [
                group["weights"].update(group_size=32)
                for group in said.get("config_groups", {}).values()
            ],
            "config.json: quantization_config",
            ("config_groups.group_0.weights.group_size is 32; nvfp4 has 16",),
        ),
        (
            NVFP4,
            lambda said: [
                group["weights"].update(num_bits=8)
                for group in said.get("config_groups", {}).values()
            ],
            "config.json: quantization_config",
            ("num_bits is 8",),
        ),
        (
            NVFP4,
            lambda said: [
                group.pop("input_activations") for group in said.get("config_groups", {}).values()
            ],
            LAYER,
            ("is nvfp4", "it is nvfp4-w4a16"),
        ),
        (
            MXFP8,
            lambda said: said.update(group_size=16),
            "hf_quant_config.json",
            ("group_size is 16",),
        ),
        (
            NVFP4,
            lambda said: said.update(
                kv_cache_quant_algo="FP8", kv_cache_scheme={"num_bits": 8, "type": "float"}
            ),
            "config.json: quantization_config",
            ("KV cache is FP8", "no k_scale"),
        ),
        (
            NVFP4,
            lambda said: said.update(quant_algo="MIXED_PRECISION"),
            "config.json: quantization_config",
            ("quantized_layers",),
        ),
        (
            NVFP4,
            lambda said: said.update({"ignore": "lm_head"}),
            "config.json: quantization_config",
            ('"ignore" must be a list',),
        ),
        (
            NVFP4,
            lambda said: said.update(quant_method="awq"),
            "config.json: quantization_config",
            ("quant_method 'awq' is unknown",),
        ),
    ],
)
def test_edited_configuration_of_modelopt_is_found(tmp_path, base, edit, where, texts):
    folder = copy(base, tmp_path)
    quantization(folder, edit)
    assert finding(folder, where, *texts).effect


@pytest.mark.parametrize("entry", ["gate", "model.layers.7.mlp*", "*vision_tower*", "lm_head"])
def test_entries_that_hit_nothing_quantized_are_no_harm(tmp_path, entry):
    folder = copy(NVFP4, tmp_path)
    quantization(folder, append(entry))
    assert verify(folder).found == []


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (append("model.layers.0.self_attn*"), "exclude_modules has model.layers.0.self_attn*"),
        (remove("lm_head"), "exclude_modules lacks lm_head"),
        (lambda said: said.update(quant_algo="FP8"), "quant_algo is FP8, in config.json NVFP4"),
        (lambda said: said.update(kv_cache_quant_algo="FP8"), "says an FP8 KV cache"),
        (lambda said: said.update(kv_cache_quant_algo=[1]), "kv_cache_quant_algo is [1]"),
        (lambda said: said.pop("kv_cache_quant_algo"), 'has no "kv_cache_quant_algo"'),
        (lambda said: said.pop("group_size"), 'has no "group_size"'),
    ],
)
def test_files_that_disagree_are_found(tmp_path, edit, text):
    folder = copy(NVFP4, tmp_path)
    edit_json(folder / "hf_quant_config.json", lambda value: edit(value["quantization"]))
    assert finding(folder, "hf_quant_config.json", text).effect


def test_a_file_of_modelopt_without_what_it_is_for_is_found(tmp_path):
    folder = copy(NVFP4, tmp_path)
    edit_json(folder / "hf_quant_config.json", lambda value: value.update(quantization="FP8"))
    assert 'no object "quantization"' in verify(folder).found[0].problem


def test_only_runtimes_that_read_a_file_are_misled_by_it(tmp_path):
    folder = copy(NVFP4, tmp_path)
    edit_json(
        folder / "hf_quant_config.json",
        lambda value: value["quantization"]["exclude_modules"].remove("lm_head"),
    )
    found = finding(folder, "lm_head")
    assert "TensorRT-LLM read that it is nvfp4" in found.problem
    assert "vLLM" not in found.problem
    loads = {runtime.name: runtime.loads for runtime in verify(folder).runtimes}
    assert loads == {"vLLM": True, "SGLang": True, "TensorRT-LLM": False, "transformers": False}


def test_a_stale_file_of_modelopt_is_found(tmp_path):
    out = convert(tmp_path, "fp8-block", "fp8")
    shutil.copy(NVFP4 / "hf_quant_config.json", out)
    finding(out, "hf_quant_config.json", "is there beside quant_method 'fp8'")


def test_quantized_weights_without_a_word_are_found(tmp_path):
    folder = copy(NVFP4, tmp_path)
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    (folder / "hf_quant_config.json").unlink()
    finding(folder, "config.json", "says nothing of quantization")


def test_words_without_quantized_weights_are_found(tmp_path):
    folder = copy(FIXTURES / "qwen3_moe" / "source", tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=FP8))
    finding(folder, "config.json: quantization_config", "none is")


@pytest.mark.parametrize(
    ("edit", "where", "texts"),
    [
        (
            lambda said: said.update(weight_block_size=[64, 64]),
            "config.json: quantization_config",
            ("weight_block_size is [64, 64]",),
        ),
        (
            lambda said: said.update(weight_block_size=[1, 32]),
            LAYER,
            ("is fp8-block", "it is mxfp8"),
        ),
        (lambda said: said.pop("weight_block_size"), LAYER, ("it is fp8-tensor",)),
        (
            lambda said: said.update(activation_scheme="none"),
            "config.json: quantization_config",
            ("activation_scheme is none",),
        ),
        (remove(ROUTER), ROUTER, ("is not quantized", "it is fp8-block")),
        (remove("lm_head"), "lm_head", ("and transformers read that it is fp8-block",)),
        (
            lambda said: said.update(ignored_layers=["lm_head"]),
            ROUTER,
            ("and vLLM read that it is fp8-block",),
        ),
        (
            lambda said: said.update(ignored_layers=said.pop("modules_to_not_convert")),
            QKV,
            ("and TensorRT-LLM and transformers read that it is fp8-block",),
        ),
        (append("model.layers.0.mlp.experts"), LAYER, ("is fp8-block", "vLLM")),
        (append(f"{LAYER}.3.up_proj"), LAYER, ("is fp8-block", "vLLM")),
    ],
)
def test_edited_configuration_of_fp8_is_found(tmp_path, edit, where, texts):
    out = convert(tmp_path, "fp8-block", "fp8")
    quantization(out, edit)
    finding(out, where, *texts)


@pytest.mark.parametrize(
    ("edit", "where", "texts"),
    [
        (lambda said: said["ignore"].clear(), ROUTER, ("is not quantized", "it is fp8-channel")),
        (append("re:.*self_attn.*"), QKV, ("is fp8-channel", "not quantized")),
        (
            append(f"{LAYER}.2.up_proj"),
            f"{LAYER}.2.up_proj",
            ("one expert of a layer",),
        ),
        (
            lambda said: group(said).update(targets=[]),
            "config.json: quantization_config",
            ("nothing is quantized",),
        ),
        (
            lambda said: group(said)["weights"].update(strategy="tensor"),
            LAYER,
            ("is fp8-channel", "it is fp8-tensor"),
        ),
        (
            lambda said: group(said)["weights"].update(num_bits=3),
            "config.json: quantization_config",
            ("no known number",),
        ),
        (
            lambda said: group(said).update(format="pack-quantized"),
            "config.json: quantization_config",
            ("format is pack-quantized; fp8-channel is float-quantized",),
        ),
        *(
            (append(f"re:{expression}"), "config.json: quantization_config", (text,))
            for expression, text in (
                ("((", "no regular expression"),
                ("(.+)+x", "can take forever"),
                ("(?:[a-z.]*|b)*x", "can take forever"),
                (".*a" * 30, "can take forever"),
                ("a{99999999999999999999}", "no regular expression"),
            )
        ),
        *(
            (
                lambda said, key=key, value=value: group(said)["input_activations"].update(
                    {key: value}
                ),
                "config.json: quantization_config",
                (f"input_activations.{key} is",),
            )
            for key, value in (("dynamic", False), ("strategy", "tensor"), ("num_bits", 4))
        ),
        (
            lambda said: group(said).update(input_activations=[]),
            "config.json: quantization_config",
            ("input_activations must be an object",),
        ),
        (
            lambda said: said.update(kv_cache_scheme=["a"]),
            "config.json: quantization_config",
            ("kv_cache_scheme is ['a']",),
        ),
        (
            lambda said: said.pop("quant_method"),
            "config.json: quantization_config",
            ("has no quant_method",),
        ),
        (
            lambda said: said.update(quant_method="bitsandbytes"),
            "config.json: quantization_config",
            ("is unknown",),
        ),
    ],
)
def test_edited_configuration_of_compressed_tensors_is_found(tmp_path, edit, where, texts):
    out = convert(tmp_path, "fp8-channel", "compressed-tensors", quantize="linear")
    quantization(out, edit)
    finding(out, where, *texts)


def group(said):
    return said["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("edit", "where", "texts"),
    [
        (
            lambda said: said["quantized_layers"].pop("model.layers.1.mlp.experts"),
            "model.layers.1.mlp.experts",
            ("is nvfp4", "not quantized"),
        ),
        (
            lambda said: said["quantized_layers"]["model.layers.1.mlp.experts"].update(
                quant_algo="FP8"
            ),
            "model.layers.1.mlp.experts",
            ("is nvfp4", "it is fp8-tensor"),
        ),
        (
            lambda said: said["quantized_layers"]["model.layers.1.mlp.experts"].update(
                quant_algo="NVFP9"
            ),
            "config.json: quantization_config",
            ("unknown quant_algo",),
        ),
        (
            lambda said: said.get("config_groups", {"group_0": {"targets": []}})["group_0"][
                "targets"
            ].append("model.x"),
            "config.json: quantization_config",
            ("model.x: is not in quantized_layers",),
        ),
    ],
)
def test_edited_configuration_of_a_mix_is_found(tmp_path, edit, where, texts):
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "{}"\nformat = "{}"\n'
    recipe.write_text(rule.format("*.experts.*", "nvfp4") + rule.format("*", "fp8-tensor"))
    out = tmp_path / "out"
    stats = [FIXTURES / "qwen3_moe" / "stats.json"]
    source = FIXTURES / "qwen3_moe" / "source"
    moe_ckpt.convert(source, out, recipe=recipe, stats=stats, device="cpu")
    shutil.rmtree(out / ".moe-ckpt")
    assert verify(out).found == []
    quantization(out, edit)
    finding(out, where, *texts)


def test_scales_of_a_kv_cache_go_with_a_scheme(tmp_path):
    folder = copy(NVFP4, tmp_path)
    name = "model.layers.0.self_attn.k_proj.k_scale"
    add(folder, name, "F32", (), float32(1))
    finding(folder, name, "no file says")
    finding(folder, "model.layers.0.self_attn.v_proj.v_scale", f"is missing beside {name}")
    add(folder, "model.layers.0.self_attn.v_proj.v_scale", "F32", (), float32(0))
    quantization(
        folder,
        lambda said: said.update(
            kv_cache_quant_algo="FP8", kv_cache_scheme={"num_bits": 8, "type": "float"}
        ),
    )
    assert [(f.part, f.where) for f in verify(folder).found] == [
        ("scales", "model.layers.0.self_attn.v_proj.v_scale")
    ]


def test_parts_of_one_module_must_be_quantized_alike(tmp_path):
    folder = copy(NVFP4, tmp_path)
    query = "model.layers.0.self_attn.q_proj"
    delete(folder, *(f"{query}.{s}" for s in ("weight_scale", "weight_scale_2", "input_scale")))
    delete(folder, f"{query}.weight")
    add(folder, f"{query}.weight", "BF16", (64, 64), bytes(64 * 64 * 2))
    assert "k_proj is nvfp4" in finding(folder, QKV).problem


def test_experts_without_a_known_model_type_are_checked_all_the_same(tmp_path):
    folder = copy(NVFP4, tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(model_type="never_heard_of"))
    findings = verify(folder)
    assert findings.found == []
    assert not any(runtime.loads for runtime in findings.runtimes)
    assert "never_heard_of is not known here" in findings.runtimes[0].why_not
    quantization(folder, remove("lm_head"))
    finding(folder, "lm_head")


def test_sizes_that_are_not_those_of_config_are_found(tmp_path):
    folder = copy(NVFP4, tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=40))
    found = verify(folder).found
    assert {finding.where for finding in found} == {"config.json"}
    assert "config.json says moe_intermediate_size=40" in found[0].problem


@pytest.mark.parametrize(
    ("folder", "runtime", "why_not"),
    [
        ("qwen3_moe/modelopt-nvfp4", "vLLM", ""),
        ("qwen3_moe/modelopt-nvfp4", "transformers", "codes of another shape"),
        ("qwen3_moe/modelopt-nvfp4-w4a16", "SGLang", "4 bits"),
        ("qwen3_moe/modelopt-fp8-channel", "vLLM", "each row"),
        ("qwen3_moe_wide/modelopt-fp8-block", "SGLang", "each block"),
        ("qwen3_moe_wide/modelopt-fp8-block", "TensorRT-LLM", ""),
        ("qwen3_moe_wide/modelopt-mxfp4", "vLLM", "no algorithm MXFP4"),
        ("qwen3_moe_wide/modelopt-mxfp8", "SGLang", ""),
        ("qwen3_moe_wide/modelopt-mxfp8", "vLLM", ""),
        ("gpt_oss/modelopt-nvfp4", "SGLang", "they stop"),
        ("gpt_oss/modelopt-nvfp4", "vLLM", "they stop"),
        ("mixtral/modelopt-nvfp4", "TensorRT-LLM", ""),
    ],
)
def test_runtimes_that_load_it_are_named(folder, runtime, why_not):
    found = {of.name: of.why_not for of in verify(FIXTURES / folder).runtimes}
    assert why_not in found[runtime]
    assert bool(why_not) == bool(found[runtime])


def test_scales_in_a_dtype_that_runtimes_convert_are_found(tmp_path):
    """The bits of E8M0 are those of U8, and its numbers are not."""
    folder = copy(MXFP8, tmp_path)
    assert verify(folder).found == []
    name = f"{LAYER}.0.up_proj.weight_scale"
    change(folder, name, dtype="F8_E8M0")
    found = verify(folder)
    assert name in [f.where for f in found.found]
    assert "F8_E8M0 by value" in {of.name: of.garbage for of in found.runtimes}["vLLM"]


def test_what_runtimes_build_in_16_bits_need_not_be_listed(tmp_path):
    """The router of DeepSeek is a class of its own everywhere; vLLM builds Qwen3's of the list."""
    source = FIXTURES / "deepseek_v3" / "source"
    moe_ckpt.convert(source, tmp_path / "out", format="fp8-channel")
    quantization(tmp_path / "out", lambda said: said["ignore"].clear())
    found = {f.where for f in verify(tmp_path / "out").found}
    assert "model.layers.1.mlp.gate" not in found
    assert found


@pytest.mark.parametrize(
    ("folder", "runtime", "garbage"),
    [
        ("qwen3_moe/modelopt-fp8", "transformers", "codes for weights"),
        ("qwen3_moe/modelopt-fp8", "SGLang", ""),
        ("qwen3_moe_wide/modelopt-mxfp8", "transformers", "codes for weights"),
        ("deepseek_v3/modelopt-fp8", "SGLang", "weight scale of q_a_proj"),
        ("deepseek_v3/modelopt-fp8", "vLLM", ""),
    ],
)
def test_runtimes_that_load_it_and_compute_garbage_are_named(tmp_path, folder, runtime, garbage):
    folder = copy(FIXTURES / folder, tmp_path)
    keys = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    edit_json(folder / "config.json", lambda config: config.update(keys))
    found = {of.name: of for of in verify(folder).runtimes}
    assert found[runtime].loads
    assert garbage in found[runtime].garbage
    assert bool(garbage) == bool(found[runtime].garbage)


@pytest.mark.parametrize(
    ("key", "stops"),
    [
        ("topk_method", {"vLLM", "SGLang"}),
        ("first_k_dense_replace", {"vLLM", "SGLang"}),
        ("moe_layer_freq", {"SGLang"}),
    ],
)
def test_a_key_that_runtimes_ask_for_is_a_warning(tmp_path, key, stops):
    """Our results have them; transformers leaves them out."""
    source = FIXTURES / "deepseek_v3" / "source"
    out = tmp_path / "out"
    moe_ckpt.convert(source, out, format="nvfp4", device="cpu")
    before = {of.name for of in verify(out).runtimes if of.loads}
    edit_json(out / "config.json", lambda config: config.pop(key))
    findings = verify(out)
    told = [found for found in findings.found if f"lacks {key}," in found.problem]
    assert [found.grade for found in told] == [WARNING]
    assert before - {of.name for of in findings.runtimes if of.loads} == stops


def test_a_scale_that_is_no_number_makes_garbage_of_it(tmp_path):
    folder = copy(NVFP4, tmp_path)

    poke(folder, f"{LAYER}.0.up_proj.weight_scale_2", float32(float("nan")))
    found = {of.name: of for of in verify(folder).runtimes}
    assert found["vLLM"].loads
    assert "weight_scale_2" in found["vLLM"].garbage


def test_a_release_of_deepseek_lists_neither_head_nor_router():
    """transformers lists what stays by itself where no list is given, and routers are its own."""
    readers = read_config("fp8", FP8).readers
    assert {read(Built("lm_head", ("lm_head",), None)) for read in readers.values()} == {
        "fp8-block"
    }


def test_a_release_of_deepseek_is_clean(tmp_path):
    out = convert(tmp_path, "fp8-block", "fp8", model="qwen3_moe_wide")
    edit_json(out / "config.json", lambda config: config.update(model_type="deepseek_v3"))
    quantization(out, lambda said: said.pop("modules_to_not_convert"))
    found = {f.where for f in verify(out).found if f.part == "config"}
    assert "lm_head" not in found
    assert ROUTER not in found
    assert QKV in found


def test_a_release_of_deepseek_v4_loads(tmp_path):
    """Experts in MXFP4 under int8, all else in FP8 blocks, scales E8M0, and a router on no list."""
    tensors, _ = stored_as.experts(
        stored_as.mxfp4, 2, 64, 64, module="layers.0.ffn.experts", ending=".scale", dtype="F8_E8M0"
    )
    for old, new in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        tensors = {
            name.replace(old, new): t.view(torch.int8) if name.endswith(".weight") else t
            for name, t in tensors.items()
        }
    tensors["layers.0.ffn.gate.weight"] = torch.ones(2, 64, dtype=torch.bfloat16)
    sizes = {"count": 2, "i": 64, "h": 64, "model_type": "deepseek_v4", "expert_dtype": "fp4"}
    stored_as.save(tmp_path / "in", tensors, FP8, **sizes)
    findings = verify(tmp_path / "in")
    assert findings.found == []
    loads = [runtime.name for runtime in findings.runtimes if runtime.loads]
    assert loads == ["vLLM", "SGLang", "transformers"]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (FP8 | {"weight_block_size": "x"}, "weight_block_size"),
        (FP8 | {"weight_block_size": [[], 1]}, "weight_block_size"),
        (FP8 | {"modules_to_not_convert": {"a": 1}}, "modules_to_not_convert"),
        (CT_CHANNEL | {"config_groups": [1]}, "config_groups"),
        (CT_CHANNEL | {"config_groups": {"a": 1}}, "config_groups"),
        (CT_CHANNEL | {"config_groups": {"a": {"weights": {"group_size": []}}}}, "no known number"),
        (CT_CHANNEL | {"config_groups": {"a": {"weights": []}}}, "no known number"),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": {}}},
            },
            "quantized_layers",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "config_groups": {"a": {"weights": 3, "input_activations": {}}},
            },
            "config_groups.a.weights",
        ),
    ],
)
def test_wrong_types_in_a_configuration_are_found(said, name):
    problems = read_config(said["quant_method"], said).problems
    assert any(name in problem for problem in problems), problems


def test_linear_layers_in_w4a16_beside_experts_with_input_scales_lack_nothing(tmp_path):
    """A configuration with a group for each: only activations of experts have scales."""
    out = tmp_path / "out"
    options = {"format": "nvfp4", "dialect": "compressed-tensors", "allow_requantize": True}
    moe_ckpt.convert(W4A16, out, device="cpu", **options)
    findings = verify(out)
    assert findings.found == []
    assert findings.counts["matrices in nvfp4-w4a16"] == 8
