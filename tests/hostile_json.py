"""Bad configs, statistics, recipes and files of weight amax."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import (
    CONFIG,
    DOWN,
    EXPERTS,
    GATE_UP,
    NOT_FILES,
    Case,
    E,
    Edit,
    content,
    replace,
    sparse,
    write_stats,
)

from moe_ckpt.amax_file import amax_text, source_digest
from moe_ckpt.checkpoint import open_source


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


BIG = 10**4000
JSON_TEXTS: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "not valid JSON"),
    "cut short": ('{"a": [1, 2', "not valid JSON"),
    "not JSON": ("a: b\n", "not valid JSON"),
    "a page": ("<!DOCTYPE html>", "HTML"),
    "a pointer of LFS": ("version https://git-lfs.github.com/spec/v1\noid x", "Git LFS"),
    "a pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0.", "pickle"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "NUL": (b'{"a": 1}\0', "not valid JSON"),
    "two documents": ('{"a": 1}{"a": 2}', "not valid JSON"),
    "a list": ("[1]", "must be a JSON object, found a list"),
    "null": ("null", "must be a JSON object, found null"),
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', 'a["b"] appears twice'),
    "a key twice, then broken": ('{"a": {"b": 1, "b": 2}, ', "b appears twice"),
    "a key twice, then 6,000 digits": ('{"b": 1, "b": 2, "c": %s}' % ("9" * 6000), "digits"),
    "6,000 digits": ('{"a": %s}' % ("9" * 6000), "digits"),
}
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


def stats(modules: object, **top: object) -> Edit:
    return lambda folder: write_stats(folder, modules, **top)


def amax(value: object, module: str = DOWN) -> Edit:
    return stats({GATE_UP: {"input_amax": 1.0}, module: {"input_amax": value}})


def raw_amax(text: str) -> Edit:
    document = (
        '{"schema": "moe-ckpt/stats", "version": 1, "modules": '
        f'{{"{GATE_UP}": {{"input_amax": 1}}, "{DOWN}": {{"input_amax": {text}}}}}}}'
    )
    return content("stats.json", document)


WHERE = f'stats.json: modules["{DOWN}"].input_amax'
STATS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "without a schema": (content("stats.json", "{}"), ("stats.json: schema",)),
    "of another schema": (stats({}, schema="\x1b[1mx"), ("stats.json: schema", "\\x1b[1mx")),
    "of version 2": (stats({}, version=2), ("stats.json: version is 2",)),
    "of version 1.0": (stats({}, version="1.0"), ("stats.json: version",)),
    "of version true": (stats({}, version=True), ("stats.json: version",)),
    "of modules []": (stats([]), ("stats.json: modules", "a list")),
    "of no modules": (stats({}), ("stats.json: modules is empty", "calibrate")),
    "of a module that is a number": (stats({DOWN: 7}), (f'stats.json: modules["{DOWN}"]',)),
    "of a module with an escape": (
        stats({"\x1b[31m\n": 7}),
        ('stats.json: modules["\\x1b[31m\\n"]',),
    ),
    "of a module with a name of 200 kB": (stats({"m" * 200_000: 7}), ('modules["mmmm',)),
    "of tokens -1": (
        stats({DOWN: {"input_amax": 1, "num_tokens": -1}}),
        (f'stats.json: modules["{DOWN}"].num_tokens',),
    ),
    "with NaN": (raw_amax("NaN"), (WHERE, "NaN", "calibrate")),
    "with Infinity": (raw_amax("Infinity"), (WHERE, "too large", "calibrate")),
    "with -Infinity": (raw_amax("-Infinity"), (WHERE, "calibrate")),
    "with 1e309": (raw_amax("1e309"), (WHERE, "too large", "calibrate")),
    "with 1e400": (raw_amax("1e400"), (WHERE, "too large", "calibrate")),
    "with 1e39": (raw_amax("1e39"), (WHERE, "1e+39", "calibrate")),
    "with 4,000 digits": (raw_amax("9" * 4000), (WHERE, "too large", "calibrate")),
    "with 6,000 digits": (raw_amax("9" * 6000), ("stats.json: ", "digits")),
    "with -1": (amax(-1), (WHERE, "-1", "calibrate")),
    "with text": (amax("1.0"), (WHERE, "a string")),
    "with true": (amax(True), (WHERE, "true or false")),
    "with an object": (amax({}), (WHERE, "an object")),
    "with an empty list": (amax([]), (WHERE, "empty list")),
    "with two of four experts": (amax([1.0, 1.0]), (WHERE, "2 entries", "4 experts")),
    "with five of four experts": (amax([1.0] * 5), (WHERE, "5 entries", "4 experts")),
    "with a million experts": (amax([1.0] * 1_000_000), (WHERE, "1000000 entries")),
    "with an expert NaN": (raw_amax("[1, 1, NaN, 1]"), (f"{WHERE}[2]", "NaN", "calibrate")),
    "with an expert -0.5": (raw_amax("[1, 1, 1, -0.5]"), (f"{WHERE}[3]", "-0.5", "calibrate")),
    "with experts in lists": (amax([[1.0] * 4]), (f"{WHERE}[0]", "a list")),
    "without a projection": (
        stats({GATE_UP: {"input_amax": 1}}),
        (f"{EXPERTS}.*.down_proj", "calibrate", "--missing-stats constant"),
    ),
    "with all experts null": (amax([None] * E), (f"{EXPERTS}.*.down_proj", "calibrate")),
    "of another model": (
        stats({"model.layers.9.mlp.experts.down_proj": {"input_amax": 1}}),
        (f"{EXPERTS}.*.down_proj", "calibrate"),
    ),
    "missing": (lambda folder: (folder / "stats.json").unlink(), ("stats.json: No such file",)),
    "of 100 MB": (
        replace("stats.json", lambda path: sparse(path, 100_000_001)),
        ("stats.json: ", "more than the"),
    ),
    **{
        name: (replace("stats.json", make), ("stats.json: ", says))
        for name, (make, says) in NOT_FILES.items()
    },
}
STATS_ARGS = ("--stats", "{}/stats.json")
STATS_CASES = [
    *(
        Case(
            f"statistics: {name}",
            content("stats.json", text),
            ("stats.json: ", says),
            args=STATS_ARGS,
        )
        for name, (text, says) in JSON_TEXTS.items()
    ),
    *(Case(f"statistics {n}", edit, says, args=STATS_ARGS) for n, (edit, says) in STATS.items()),
    Case(
        "statistics on a disk that fails",
        replace("stats.json", lambda path: path.symlink_to("/proc/self/mem")),
        ("stats.json: ", "Input/output error"),
        code=5,
        args=STATS_ARGS,
    ),
]


def nothing(_: Path) -> None:
    """What the options name is not there."""


RULE = '[[rule]]\nmatch = "*"\nformat = "nvfp4"\n'
RECIPES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    name: (content("recipe.toml", text), says)
    for name, text, says in (
        ("empty", "", ("has no [[rule]]",)),
        ("not TOML", "{", ("is not TOML",)),
        ("Latin-1", b'# \xe9\n[[rule]]\nmatch = "*"', ("is not UTF-8",)),
        ("UTF-16", RULE.encode("utf-16"), ("is not UTF-8",)),
        ("BOM", b"\xef\xbb\xbf" + RULE.encode(), ("is not TOML",)),
        ("a pickle", b"\x80\x04.", ("pickle",)),
        ("deep", "a = " + "[" * 100_000, ("is not TOML",)),
        ("a key of 50,000 parts", ".".join("a" * 50_000) + " = 1", ("a key has 64 parts or more",)),
        ("6,000 digits", f"a = {'9' * 6000}", ("is not TOML",)),
        ("a key twice", RULE + 'format = "fp8"\n', ("is not TOML",)),
        ("an unknown key", RULE + "[other]\nx = 1\n", ("other", "is unknown")),
        ("rule that is a number", "rule = 7\n", ("has no [[rule]]",)),
        ("rules that are numbers", "rule = [7]\n", ("rule 1", "match and format")),
        ("a rule without format", '[[rule]]\nmatch = "*"\n', ("rule 1", "match and format")),
        ("match a number", "[[rule]]\nmatch = 7\nformat = 'nvfp4'\n", ("rule 1", "match")),
        ("match empty", "[[rule]]\nmatch = ''\nformat = 'nvfp4'\n", ("rule 1", "match")),
        ("match of lists", "[[rule]]\nmatch = [[]]\nformat = 'nvfp4'\n", ("rule 1", "match")),
        (
            "format unknown",
            "[[rule]]\nmatch = '*'\nformat = 'int3'\n",
            ("rule 1", '"int3"', "choose"),
        ),
        ("format NaN", "[[rule]]\nmatch = '*'\nformat = nan\n", ("rule 1", "choose")),
        (
            "format with an escape",
            '[[rule]]\nmatch = "*"\nformat = "\\u001b[31m"\n',
            ("rule 1", "\\x1b[31m"),
        ),
        ("everything kept", "[[rule]]\nmatch = '*'\nformat = 'keep'\n", ("nothing is left",)),
        (
            "no match",
            RULE + "[[rule]]\nmatch = 'x'\nformat = 'keep'\n",
            ("rule 2", "matches nothing"),
        ),
    )
} | {
    "missing": (nothing, ("No such file",)),
    "of 20 MB": (replace("recipe.toml", lambda p: sparse(p, 20_000_001)), ("more than the",)),
    **{name: (replace("recipe.toml", make), (says,)) for name, (make, says) in NOT_FILES.items()},
}
RECIPE_CASES = [
    Case(f"recipe: {name}", edit, ("recipe.toml: ", *says), args=("--recipe", "{}/recipe.toml"))
    for name, (edit, says) in RECIPES.items()
]


def weight_amax(change: Callable[[dict[str, Any]], object]) -> Edit:
    """A file of the right checkpoint, changed."""

    def edit(folder: Path) -> None:
        document = json.loads(amax_text(source_digest(open_source(folder / "in")), {}))
        change(document)
        (folder / "amax.json").write_text(json.dumps(document))

    return edit


def module_amax(value: object) -> Edit:
    return weight_amax(lambda d: d["modules"].update({DOWN: value}))


AMAX_WHERE = f'amax.json: modules["{DOWN}"]'
AMAXES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    **{name: (content("amax.json", text), (says,)) for name, (text, says) in JSON_TEXTS.items()},
    "of another schema": (weight_amax(lambda d: d.update(schema="x")), ("moe-ckpt scan",)),
    "of version 2": (weight_amax(lambda d: d.update(version=2)), ("moe-ckpt scan",)),
    "of version true": (weight_amax(lambda d: d.update(version=True)), ("moe-ckpt scan",)),
    "of another checkpoint": (weight_amax(lambda d: d.update(source="0" * 64)), ("moe-ckpt scan",)),
    "of source null": (weight_amax(lambda d: d.update(source=None)), ("moe-ckpt scan",)),
    "of modules []": (weight_amax(lambda d: d.update(modules=[])), ("modules", "a list")),
    "with -1": (module_amax(-1), (AMAX_WHERE, "-1", "scan")),
    "with text": (module_amax("1"), (AMAX_WHERE, '"1"', "scan")),
    "with true": (module_amax(True), (AMAX_WHERE, "true", "scan")),
    "with a list": (module_amax([1.0] * 1000), (AMAX_WHERE, "1000 in all", "scan")),
    "with no float32": (module_amax(0.1), (AMAX_WHERE, "0.1", "scan")),
    "with 1e39": (module_amax(1e39), (AMAX_WHERE, "1e+39", "scan")),
    "with 4,000 digits": (module_amax(BIG), (AMAX_WHERE, "scan")),
    "with NaN": (module_amax(float("nan")), ("NaN is not a JSON number",)),
    "with Infinity": (module_amax(float("inf")), ("Infinity is not a JSON number",)),
    "missing": (nothing, ("No such file",)),
    **{name: (replace("amax.json", make), (says,)) for name, (make, says) in NOT_FILES.items()},
}
AMAX_CASES = [
    Case(
        f"weight amax: {name}", edit, ("amax.json: ", *says), args=("--weight-amax", "{}/amax.json")
    )
    for name, (edit, says) in AMAXES.items()
]
