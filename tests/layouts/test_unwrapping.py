"""What wrappers leave in names: gone where the names behind are certain, refused elsewhere."""

from __future__ import annotations

import json

import pytest
from kit.command import run_here
from kit.files import FIXTURES, read_files, read_tensors, write_headers
from kit.tampering import copy, tensors_of, write_shard

import moe_ckpt
from moe_ckpt.errors import CheckpointError, LayoutError
from moe_ckpt.layouts.family import SPLIT
from moe_ckpt.layouts.names import named_twice, unread_names
from moe_ckpt.layouts.table import FAMILIES, find_family
from moe_ckpt.layouts.unwrapping import without_wrappers
from moe_ckpt.layouts.wrappers import family_of_config
from moe_ckpt.verify import verify

E, I, H = 4, 16, 64
CONFIG = {"num_experts": E, "moe_intermediate_size": I, "hidden_size": H, "num_hidden_layers": 2}
HEADERS = json.loads((FIXTURES / "layout-headers.json").read_text())
QWEN3 = FIXTURES / "qwen3_moe"


def model(root="model.", path="mlp.experts", head="lm_head."):
    """The headers of a model of two layers with fused experts."""
    tensors = {f"{head}weight": ("BF16", [8, H])}
    tensors |= {f"{root}{name}.weight": ("BF16", [8, H]) for name in ("embed_tokens",)}
    for layer in (0, 1):
        prefix = f"{root}layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = ("BF16", [H, H])
        tensors[f"{prefix}.{path}.gate_up_proj"] = ("BF16", [E, 2 * I, H])
        tensors[f"{prefix}.{path}.down_proj"] = ("BF16", [E, H, I])
    return tensors


def plan_of(folder, tensors, model_type="qwen3_moe", **config):
    config = CONFIG | {"model_type": model_type} | config
    write_headers(folder, {"model.safetensors": tensors}, config)
    return moe_ckpt.make_plan(folder, format="nvfp4-w4a16", quantize="linear", experts="split")


def names_of(plan):
    return {tensor.name for shard in plan.shards for tensor in shard.tensors}


def refusal(tmp_path, tensors, model_type="qwen3_moe"):
    with pytest.raises((LayoutError, CheckpointError)) as caught:
        plan_of(tmp_path / "in", tensors, model_type)
    return "\n".join(caught.value.problems)


WRAPPED = {
    "torch.compile": (lambda n: f"_orig_mod.{n}", "_orig_mod"),
    "DDP": (lambda n: f"module.{n}", "module"),
    "both": (lambda n: f"module._orig_mod.{n}", "module, _orig_mod"),
    "PEFT": (lambda n: f"base_model.model.{n}", "base_model.model"),
    "PEFT of a bare model": (
        lambda n: f"base_model.model.{n.removeprefix('model.')}",
        "base_model.model",
    ),
    "FSDP, in the layers too": (
        lambda n: f"_fsdp_wrapped_module.{n}".replace(
            ".self_attn", "._fsdp_wrapped_module.self_attn"
        ),
        "_fsdp_wrapped_module",
    ),
    "checkpointing": (
        lambda n: n.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
        "_checkpoint_wrapped_module",
    ),
    "layers of LoRA, merged": (lambda n: n.replace("q_proj", "q_proj.base_layer"), "base_layer"),
    "experts of LoRA, merged": (lambda n: n.replace("experts", "experts.base_layer"), "base_layer"),
    "the original": (lambda n: n.replace("lm_head", "lm_head.original_module"), "original_module"),
    "what was trained": (
        lambda n: n.replace("lm_head", "lm_head.modules_to_save.default"),
        "modules_to_save",
    ),
    "doubled": (lambda n: f"model.{n}", "model.*"),
    "doubled, but for the head": (lambda n: n if "lm_head" in n else f"model.{n}", "model.*"),
    "doubled, the layers alone": (
        lambda n: n.replace("model.layers", "model.model.layers"),
        "model.model.* for model.*",
    ),
    "of a multimodal class": (
        lambda n: n.replace("model.", "model.language_model."),
        "model.language_model.* for model.*",
    ),
    "in a multimodal class": (lambda n: f"language_model.{n}", "language_model.*"),
    "in a trainer": (lambda n: f"actor.{n}", "actor.*"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_are_those_of_the_release_and_a_note_says_so(tmp_path, kind):
    wrap, words = WRAPPED[kind]
    clean = plan_of(tmp_path / "clean", model())
    wrapped = {wrap(name): stored for name, stored in model().items()}
    changed = len(wrapped.keys() - model().keys())
    assert changed
    plan = plan_of(tmp_path / "wrapped", wrapped)
    assert names_of(plan) == names_of(clean)
    assert plan.runtimes == clean.runtimes
    (note,) = (note for note in plan.notes if "wrapped" in note)
    assert note.startswith(f"{changed} tensors ")
    assert words in note
    assert not any("wrapped" in note for note in clean.notes)


VISION = {"vision_tower.blocks.0.mlp.fc1.weight": ("BF16", [H, H])}


@pytest.mark.parametrize(
    ("model_type", "wrong", "right"),
    [
        (
            "llama4",
            (model("model.language_model.", "feed_forward.experts"), "model."),
            (model("language_model.model.", "feed_forward.experts", "language_model.lm_head."), ""),
        ),
        (
            "qwen3_vl_moe",
            (model("language_model.model.", head="language_model.lm_head."), ""),
            (model("model.language_model."), "model."),
        ),
    ],
)
def test_the_two_ways_of_multimodal_classes(tmp_path, model_type, wrong, right):
    plans = []
    for folder, (tensors, beside) in (("wrong", wrong), ("right", right)):
        tensors = tensors | {f"{beside}{name}": stored for name, stored in VISION.items()}
        if model_type == "llama4":  # its matrices are transposed
            tensors = {
                name: (dtype, [shape[0], *shape[:0:-1]]) for name, (dtype, shape) in tensors.items()
            }
        plans.append(plan_of(tmp_path / folder, tensors, model_type, vision_config={"depth": 1}))
    assert names_of(plans[0]) == names_of(plans[1])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {f"_orig_mod.{n}": s for n, s in model().items()}
            | {"lm_head.weight": ("BF16", [8, H])},
            ["_orig_mod.lm_head.weight, lm_head.weight", "cannot be told"],
        ),
        (
            model()
            | {
                "lm_head.original_module.weight": ("BF16", [8, H]),
                "lm_head.modules_to_save.default.weight": ("BF16", [8, H]),
            },
            ["modules_to_save", "merge_and_unload()"],
        ),
        (model() | model("model.language_model."), ["is there also as model.layers.0"]),
        (
            {f"module.{n}": s for n, s in model().items()}
            | {"value_head.weight": ("BF16", [1, H])},
            ["value_head.weight", "no runtime of qwen_moe reads it"],
        ),
        *(
            (
                model() | {f"model.layers.0.self_attn.q_proj.{leaf}": ("BF16", [H, 8])},
                [leaf, "merge"],
            )
            for leaf in ("lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector", "ia3_l")
        ),
        (model() | {"model.embed_tokens.lora_embedding_A.default": ("BF16", [8, 8])}, ["merge"]),
        *(
            (
                model() | {f"model.layers.0.self_attn.o_proj.{leaf}": ("BF16", [H, H])},
                [leaf, "PyTorch computes a weight from this"],
            )
            for leaf in ("parametrizations.weight.original", "weight_orig", "weight_mask")
        ),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path, tensors, words):
    text = refusal(tmp_path, tensors)
    assert all(word in text for word in words), text


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    plan_of(tmp_path / "in", model())
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    plan = moe_ckpt.make_plan(tmp_path / "in", format="bf16")
    assert "adapter_config.json" in plan.left_out  # transformers would load what it names
    (tmp_path / "in" / "adapter_model.safetensors").write_bytes(b"")
    done = run_here("convert", tmp_path / "in", tmp_path / "out", "--format", "bf16")
    assert done.returncode == 3
    assert "adapter_model.safetensors: is an adapter" in done.stderr
    assert "merge_and_unload" in done.stderr


# Whole conversions


def wrapped_copy(source, folder, wrap):
    """A copy of a checkpoint without an index, of one shard, with other names."""
    folder.mkdir()
    out = copy(source, folder)
    tensors = {}
    for path in sorted(out.glob("*.safetensors*")):
        tensors |= tensors_of(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    write_shard(out / "model.safetensors", {wrap(n): tensor for n, tensor in tensors.items()})
    return out


@pytest.mark.parametrize("of_stats", ["plain", "wrapped"])
@pytest.mark.parametrize("kind", ["torch.compile", "FSDP, in the layers too", "doubled"])
def test_the_same_bytes_with_statistics_of_either_names(tmp_path, kind, of_stats):
    wrap, _ = WRAPPED[kind]
    clean = wrapped_copy(QWEN3 / "source", tmp_path / "clean", str)
    wrapped = wrapped_copy(QWEN3 / "source", tmp_path / "wrapped", wrap)
    stats = json.loads((QWEN3 / "stats.json").read_text())
    if of_stats == "wrapped":
        stats["modules"] = {wrap(name): entry for name, entry in stats["modules"].items()}
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    asked = {"format": "nvfp4", "quantize": "linear", "device": "cpu"}
    moe_ckpt.convert(clean, tmp_path / "a", stats=[QWEN3 / "stats.json"], **asked)
    made = moe_ckpt.convert(wrapped, tmp_path / "b", stats=[tmp_path / "stats.json"], **asked)
    assert read_tensors(tmp_path / "a") == read_tensors(tmp_path / "b")
    assert not any("ignored" in warning for warning in made.plan.warnings)
    assert verify(tmp_path / "b", source=wrapped).found == []


def test_scans_and_recipes_use_the_names_of_the_release(tmp_path):
    wrap, _ = WRAPPED["both"]
    wrapped = wrapped_copy(QWEN3 / "source", tmp_path / "wrapped", wrap)
    assert run_here("scan", wrapped, "-o", tmp_path / "amax.json").returncode == 0
    assert all(name.startswith("model.") for name in modules_in(tmp_path / "amax.json"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[rule]]\nmatch = "model.layers.0.*"\nformat = "keep"\n\n'
        '[[rule]]\nmatch = "*.experts.*"\nformat = "nvfp4-w4a16"\n'
    )
    options = ("--recipe", recipe, "--weight-amax", tmp_path / "amax.json")
    done = run_here("convert", wrapped, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    found = read_tensors(tmp_path / "out")
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale" in found
    assert "model.layers.0.mlp.experts.0.up_proj.weight_scale" not in found


def modules_in(path):
    return [n for n in json.loads(path.read_text())["modules"] if "lm_head" not in n]


def test_scales_of_a_quantized_source_lose_the_same_words(tmp_path):
    def wrap(name):
        return f"base_model.model.{name}".replace("_proj.", "_proj.base_layer.")

    source = QWEN3 / "modelopt-fp8"
    wrapped = wrapped_copy(source, tmp_path / "wrapped", wrap)
    moe_ckpt.convert(source, tmp_path / "a", format="fp8-tensor", device="cpu")
    moe_ckpt.convert(wrapped, tmp_path / "b", format="fp8-tensor", device="cpu")
    files = [
        {name: data for name, data in read_files(tmp_path / each).items() if name[0] != "."}
        for each in "ab"
    ]
    assert files[0] == files[1]


# What is in the table


def test_names_of_the_releases_are_read():
    for model_type, forms in HEADERS.items():
        config, header = forms["A"]["config"], forms["A"]["header"]
        family = family_of_config(config)
        if family is None:
            continue
        names = [family.runtime_name(name) for name in header]
        assert unread_names(family, names) == [], model_type
        assert named_twice(family, names) == [], model_type


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_word_in_a_name_is_never_read(family):
    for root in family.roots:
        name = f"{root}layers.0.{family.split_form.path}.0.x.weight"
        assert unread_names(family, [name]) == []
        assert unread_names(family, [f"_orig_mod.{name}"]) != []
        assert unread_names(family, [f"{name}.lora_A.weight"]) != []
        assert without_wrappers(f"module.{name}") == name
    assert family.split_form.layout == SPLIT


def test_layers_at_another_root_are_not_read():
    qwen = find_family("qwen3_moe")
    wrong = [
        "model.language_model.layers.0.mlp.gate.weight",
        "model.model.layers.0.mlp.gate.weight",
    ]
    wrong += ["value_head.weight", "model.lm_head.weight"]
    right = ["model.norm.weight", "lm_head.weight", "visual.blocks.0.mlp.weight", "mtp.norm.weight"]
    assert unread_names(qwen, [*wrong, *right]) == wrong
