"""Bad files that options name: statistics, recipes and weight amax."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.hostile import (
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
from kit.hostile.texts import BIG, JSON_TEXTS

from moe_ckpt.planning.amax_file import amax_text, source_digest
from moe_ckpt.source.checkpoint import open_source


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
