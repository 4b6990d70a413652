"""What was read of a configuration, and the kinds of values that all of them hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import show
from ..formats import find_format
from .expressions import problem_with
from .matching import Reader

__all__ = ["Reading", "first_of", "groups_of", "require_scale", "texts_of"]


@dataclass(slots=True)
class Reading:
    """How runtimes read what one file says.

    ``readers``: runtime -> the format of a module. ``static``: formats whose activations have a
    scale that must be stored. ``problems``: what is wrong with the words themselves.
    ``entries``: the list of what is not quantized, and ``has_list`` whether there is one.
    ``layers``: module -> format, of a mix.
    """

    readers: dict[str, Reader] = field(default_factory=dict)
    static: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    entries: tuple[str, ...] = ()
    layers: dict[str, str] = field(default_factory=dict)
    has_list: bool = False


def texts_of(value: Any, key: str, reading: Reading) -> tuple[str, ...]:
    """The names and patterns of a list; what cannot be one is a problem."""
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        reading.has_list = True
        return tuple(entry for entry in value if _is_usable(entry, key, reading))
    reading.problems.append(f'"{key}" must be a list of names, found {show(value)}')
    return ()


def _is_usable(entry: str, key: str, reading: Reading) -> bool:
    """Whether a name, pattern or expression can be matched in bounded time."""
    if not entry.startswith("re:") and "*" not in entry:
        return True
    expression = entry[3:] if entry.startswith("re:") else entry.replace("*", ".*")
    problem = problem_with(expression)
    if problem:
        reading.problems.append(f'"{key}": {show(entry)}: {problem}')
    return not problem


def first_of(said: Mapping[str, Any], *keys: str) -> tuple[str, Any]:
    """The first of some keys that is there, and its value."""
    return next(((key, said[key]) for key in keys if key in said), (keys[0], None))


def require_scale(found: str, reading: Reading) -> None:
    """Note that activations of a format have a scale that is stored, if they have one."""
    if find_format(found).input_scale:
        reading.static.add(found)


def groups_of(said: Mapping[str, Any], reading: Reading) -> dict[str, Mapping[str, Any]]:
    """The groups of a configuration, by name."""
    groups = said.get("config_groups")
    if groups is None:
        return {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        reading.problems.append('"config_groups" must be an object of groups')
        return {}
    return groups
