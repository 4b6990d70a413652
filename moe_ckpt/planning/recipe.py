"""Recipes: which modules become which number format.

    [[rule]]
    match = "model.layers.0.*"
    format = "keep"

    [[rule]]
    match = ["*.experts.*"]
    format = "nvfp4"

    [[rule]]
    match = "*.self_attn.*"
    format = "fp8-tensor"

``match`` is a pattern or a list of them, with ``*``, ``?`` and ``[...]`` as in file names, for
whole names of output modules, such as ``model.layers.0.mlp.experts.3.up_proj``. The first rule
that matches counts; what none matches is kept. Only linear layers and routed experts are asked
about: what moe-ckpt never quantizes (heads, embeddings, routers, parts of other kinds) stays as
it is.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path
from typing import Any

from ..errors import InputError, Problems, RecipeError, UsageError, show, show_some
from ..formats import FORMATS, find_format
from ..source.files import impostor, read_regular
from ..source.strict_json import show_value

__all__ = [
    "KEEP",
    "QUANTIZE",
    "Recipe",
    "Rule",
    "built_in",
    "read_recipe",
    "recipe_text",
]

KEEP = "keep"
QUANTIZE = ("experts", "linear")
_CAP_NBYTES = 20_000_000
_STRINGS = re.compile(rb"\"[^\"\n]*\"|'[^'\n]*'|#[^\n]*")
_SEPARATORS = re.compile(rb"[=,{}\[\]\n]")
_KEY_PARTS = 64  # the time to read a key grows with their square


@dataclass(frozen=True, slots=True)
class Rule:
    """Patterns, and the format of what they match, or "keep"."""

    patterns: tuple[str, ...]
    format: str


@dataclass(slots=True)
class Recipe:
    """Ordered rules; it remembers which of them matched something.

    ``file`` is what to call it in messages; '' for a built-in one, whose rules need not match.
    """

    rules: tuple[Rule, ...]
    file: str = ""
    _compiled: list[re.Pattern[str]] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for rule in self.rules:
            self._compiled.append(re.compile("|".join(map(translate, rule.patterns))))

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of all rules, in order."""
        return tuple(dict.fromkeys(r.format for r in self.rules if r.format != KEEP))

    def format_of(self, *names: str) -> str:
        """The format of a module that goes by these names; "keep" if no rule matches one."""
        found = None
        for position, pattern in enumerate(self._compiled):
            if found is not None and position in self._used:
                continue
            if any(pattern.match(name) for name in names):
                self._used.add(position)
                found = self.rules[position].format if found is None else found
        return KEEP if found is None else found

    def saw_kept(self, modules: Iterable[str]) -> None:
        """Count rules that keep what is kept in any case as used."""
        for position, rule in enumerate(self.rules):
            if rule.format == KEEP and position not in self._used:
                pattern = self._compiled[position]
                if any(pattern.match(name) for name in modules):
                    self._used.add(position)

    def refuse_unused(self, kept: Sequence[str], problems: Problems) -> None:
        """Report rules that matched nothing."""
        for position, rule in enumerate(self.rules):
            if not self.file or position in self._used:
                continue
            hits = [name for name in kept if self._compiled[position].match(name)]
            why = f"; {show_some(hits)} is never quantized" if hits else ""
            problems.add(
                RecipeError,
                f"{self.file}: rule {position + 1}: {show_some(rule.patterns)} matches nothing "
                f"that can be quantized{why}",
            )


def built_in(quantize: str, format_name: str) -> Recipe:
    """The recipe of ``--quantize``: "experts" for routed experts only, or "linear" for all."""
    find_format(format_name)
    if quantize not in QUANTIZE:
        raise UsageError(
            f"--quantize {show(quantize)!r} is unknown; choose {', '.join(QUANTIZE)}, or write a "
            "--recipe"
        )
    pattern = "*" if quantize == "linear" else "*.experts.[0-9]*"
    return Recipe((Rule((pattern,), format_name),))


def read_recipe(file: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: naming the file and the rule of every problem.
    """
    path = Path(file)
    name = show(path.name)
    text = read_regular(path, _CAP_NBYTES, RecipeError)
    top = _parse(text, name)
    entries = top.get("rule")
    problems = Problems()
    unknown = [key for key in top if key != "rule"]
    if unknown:
        problems.add(RecipeError, f"{name}: {show_some(unknown)} is unknown; a recipe has [[rule]]")
    if not isinstance(entries, list) or not entries:
        problems.add(RecipeError, f"{name}: has no [[rule]] with match and format")
        entries = []
    rules = []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_rule(entry, f"{name}: rule {number}"))
        except InputError as error:
            problems.absorb(error)
    problems.check()
    recipe = Recipe(tuple(rules), name)
    if not recipe.formats:
        raise RecipeError(f"{name}: every rule keeps what it matches; nothing is left to do")
    return recipe


def _parse(text: bytes, name: str) -> dict[str, Any]:
    if what_it_is := impostor(text):
        raise RecipeError(f"{name}: {what_it_is}")
    code = _STRINGS.sub(b"", text)
    if any(part.count(b".") >= _KEY_PARTS for part in _SEPARATORS.split(code)):
        raise RecipeError(f"{name}: is not TOML of a recipe: a key has {_KEY_PARTS} parts or more")
    try:
        return tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: is not UTF-8 text, from byte {error.start} on") from None
    except RecursionError:
        raise RecipeError(f"{name}: is not TOML: it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: is not TOML: {show(error)}") from None
    except ValueError:  # Python refuses to read such an integer
        raise RecipeError(f"{name}: is not TOML: a number has too many digits") from None


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict) or set(entry) != {"match", "format"}:
        keys = show_some(entry) if isinstance(entry, dict) and entry else "something else"
        raise RecipeError(f"{where}: must have match and format, and nothing else; found {keys}")
    match, wanted = entry["match"], entry["format"]
    patterns = [match] if isinstance(match, str) else match
    if not isinstance(patterns, list) or not patterns:
        raise RecipeError(f"{where}: match must be a pattern or a list of patterns")
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise RecipeError(f"{where}: match holds something that is not a pattern")
    known = [row.name for row in FORMATS]
    if wanted != KEEP and wanted not in known:
        raise RecipeError(
            f"{where}: format {show_value(wanted)} is unknown; choose {', '.join(known)} or keep"
        )
    return Rule(tuple(patterns), str(wanted))


def recipe_text(modules: Mapping[str, Sequence[str]]) -> str:
    """A recipe that says of each module by name what it becomes: format -> modules."""
    lines = []
    for format_name, names in modules.items():
        escaped = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
        lines += ["[[rule]]", f"format = {json.dumps(format_name)}", "match = ["]
        lines += [f"  {json.dumps(name)}," for name in escaped]
        lines += ["]", ""]
    return "\n".join(lines)
