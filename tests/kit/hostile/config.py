"""Bad configs."""

from __future__ import annotations

import json
from pathlib import Path

from kit.hostile import CONFIG, NOT_FILES, Case, Edit, content, replace, sparse
from kit.hostile.texts import BIG, JSON_TEXTS


def config(**change: object) -> Edit:
    """Other values in the config; ... removes a key."""
    changed = CONFIG | change
    text = json.dumps({key: value for key, value in changed.items() if value is not ...})
    return content("in/config.json", text)


def raw_config(old: str, new: str) -> Edit:
    text = json.dumps(CONFIG)
    assert old in text
    return content("in/config.json", text.replace(old, new, 1))


def config_text(data: bytes | str) -> Edit:
    return content("in/config.json", data)


def nested(**text_config: object) -> Edit:
    """The sizes in a text model within."""
    return config(
        **{key: ... for key in CONFIG if key != "model_type"}, text_config=CONFIG | text_config
    )


CONFIGS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "without expert counts": (config(num_experts=...), ("4 experts", "config.json says nothing")),
    "with another expert count": (config(num_experts=8), ("4 experts", "num_experts=8")),
    "with 0 experts": (config(num_experts=0), ("config.json: num_experts", "0")),
    "with -4 experts": (config(num_experts=-4), ("config.json: num_experts", "-4")),
    "with 4.0 experts": (config(num_experts=4.0), ("config.json: num_experts", "4.0")),
    "with '4' experts": (config(num_experts="4"), ("config.json: num_experts", '"4"')),
    "with true experts": (config(num_experts=True), ("config.json: num_experts", "true")),
    "with experts {}": (config(num_experts={}), ("config.json: num_experts", "{}")),
    "with experts [[4]]": (config(num_experts=[[4]]), ("config.json: num_experts", "[[4]]")),
    "with 1e309 experts": (
        raw_config('"num_experts": 4', '"num_experts": 1e309'),
        ("config.json: num_experts",),
    ),
    "with NaN experts": (
        raw_config('"num_experts": 4', '"num_experts": NaN'),
        ("config.json: num_experts",),
    ),
    "with 10^4000 experts": (config(num_experts=BIG), ("config.json: num_experts",)),
    "with 2^63 experts": (config(num_experts=2**63), ("config.json: num_experts",)),
    "with a million expert counts": (
        config(num_experts=list(range(1, 1_000_000))),
        ("config.json: num_experts", "999999 in all"),
    ),
    "with counts that disagree": (
        config(num_local_experts=8),
        ("config.json: expert counts disagree", "num_experts=4", "num_local_experts=8"),
    ),
    "with a text model that disagrees": (
        config(text_config=CONFIG | {"num_experts": 8}),
        ("config.json: expert counts disagree", "text_config.num_experts=8"),
    ),
    "with a text model of another count": (nested(num_experts=5), ("text_config.num_experts=5",)),
    "with a text model of 0": (nested(num_experts=0), ("config.json: text_config.num_experts",)),
    "with a text model that is text": (
        config(num_experts=..., text_config="qwen3"),
        ("config.json says nothing",),
    ),
    "with another width": (config(moe_intermediate_size=48), ("moe_intermediate_size=48",)),
    "with width 0": (config(moe_intermediate_size=0), ("config.json: moe_intermediate_size",)),
    "with width text": (config(moe_intermediate_size="x"), ("moe_intermediate_size", '"x"')),
    "with another hidden size": (config(hidden_size=128), ("hidden_size=128",)),
    "with hidden size -64": (config(hidden_size=-64), ("config.json: hidden_size", "-64")),
    "with hidden size null": (config(hidden_size=None), ("columns of up (H)",)),
    "with layers 10^4000": (config(num_hidden_layers=BIG), ("config.json: num_hidden_layers",)),
    "with layers -1": (config(num_hidden_layers=-1), ("config.json: num_hidden_layers", "-1")),
    "with layers text": (config(num_hidden_layers="1"), ("config.json: num_hidden_layers",)),
    "without a model type": (config(model_type=...), ("config.json: model_type", "--layout")),
    "with model type null": (config(model_type=None), ("config.json: model_type",)),
    "with model type a list": (config(model_type=["qwen3_moe"]), ("config.json: model_type",)),
    "with an unknown model type": (config(model_type="new_moe"), ("config.json: model_type",)),
    "with an escape for model type": (
        config(model_type="\x1b[31mqwen\n"),
        ("config.json: model_type", "\\x1b[31mqwen\\n"),
    ),
    "with a model type of 1 MB": (config(model_type="q" * 1_000_000), ("config.json: model_type",)),
    "with a dense model type": (config(model_type="llama"), ("config.json: model_type", "llama")),
    "quantized in an unknown way": (
        config(quantization_config={"quant_method": "gguf2"}),
        ("config.json: quantization_config", "gguf2", "cannot be read"),
    ),
    "quantized in no named way": (
        config(quantization_config={"bits": 4}),
        ("config.json: quantization_config", "cannot be read"),
    ),
    "quantized, says a list": (
        config(quantization_config=["fp8"]),
        ("config.json: quantization_config", "cannot be read"),
    ),
    "quantized, says a number": (
        config(quantization_config=8),
        ("config.json: quantization_config", "cannot be read"),
    ),
    "quantized, with an escape": (
        config(quantization_config={"quant_method": "\x1b[31m"}),
        ("config.json: quantization_config", "\\x1b[31m"),
    ),
    "quantized in blocks of text": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": "x" * 9999}),
        ("config.json: quantization_config", "weight_block_size"),
    ),
    "quantized by an unknown algorithm": (
        config(quantization_config={"quant_method": "modelopt", "quant_algo": ["NVFP4_AWQ"]}),
        ("config.json: quantization_config", "quant_algo"),
    ),
    "quantized, in the text model": (
        nested(quantization_config={"quant_method": "gptq"}),
        ("config.json: text_config.quantization_config", "gptq"),
    ),
    "quantized, says hf_quant_config.json": (
        content("in/hf_quant_config.json", '{"quantization": {"quant_algo": "W4A8_AWQ"}}'),
        ("hf_quant_config.json", "W4A8_AWQ"),
    ),
    "beside a broken hf_quant_config.json": (
        content("in/hf_quant_config.json", "{"),
        ("hf_quant_config.json: is not valid JSON",),
    ),
    "missing": (lambda folder: (folder / "in/config.json").unlink(), ("config.json: is missing",)),
    "of 7 million lists": (
        config_text("[" + "[]," * 7_000_000 + "0]"),
        ("config.json: holds millions of values",),
    ),
    "of 30 MB": (
        replace("in/config.json", lambda path: sparse(path, 30_000_001)),
        ("config.json: ", "more than the"),
    ),
    **{
        name: (replace("in/config.json", make), ("config.json: ", says))
        for name, (make, says) in NOT_FILES.items()
    },
}


def adapter(folder: Path) -> None:
    (folder / "in" / "config.json").unlink()
    (folder / "in" / "adapter_config.json").write_text("{}")


CONFIG_CASES = [
    *(
        Case(f"config: {name}", config_text(text), ("config.json: ", says))
        for name, (text, says) in JSON_TEXTS.items()
    ),
    *(Case(f"config {name}", edit, says) for name, (edit, says) in CONFIGS.items()),
    Case("config of an adapter", adapter, ("adapter_config.json: ", "merge it")),
    Case(
        "config on a disk that fails",
        replace("in/config.json", lambda path: path.symlink_to("/proc/self/mem")),
        ("config.json: ", "Input/output error"),
        code=5,
    ),
]
