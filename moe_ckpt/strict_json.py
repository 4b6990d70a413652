"""JSON from strangers: duplicate keys, wrong encodings and oversized files are errors."""

from __future__ import annotations

import json
from typing import Any

from .errors import InputError, show


class _DuplicateKeyError(Exception):
    pass


class _Pairs(list[tuple[str, Any]]):
    """An object with all its keys, those that appear twice too."""


def _path_of_duplicate(text: bytes) -> str:
    """Where the first key that an object has twice stands, such as ``modules["a"]["b"]``."""
    todo: list[tuple[str, Any]] = [("", json.loads(text, object_pairs_hook=_Pairs))]
    while todo:
        path, value = todo.pop()
        if isinstance(value, _Pairs):
            seen: set[str] = set()
            for key, inner in value:
                here = f'{path}["{show(key)}"]' if path else show(key)
                if key in seen:
                    return here
                seen.add(key)
                todo.append((here, inner))
        elif isinstance(value, list):
            todo += ((f"{path}[{position}]", inner) for position, inner in enumerate(value))
    return "a key"


def parse(text: bytes, where: str, kind: type[InputError], *, constants: bool = False) -> Any:
    """Parse JSON; ``where`` starts every message.

    Duplicate keys are refused, and so are NaN and Infinity unless ``constants`` is true.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _DuplicateKeyError
        return found

    def refuse(constant: str) -> float:
        raise kind(f"{where}: {constant} is not a JSON number")

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=None if constants else refuse,
        )
    except _DuplicateKeyError:
        raise kind(f"{where}: {_path_of_duplicate(text)} appears twice") from None
    except RecursionError:
        raise kind(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise kind(f"{where}: is not valid JSON: {show(error)}") from None


def parse_object(
    text: bytes, where: str, kind: type[InputError], *, constants: bool = False
) -> dict[str, Any]:
    """Parse JSON that must be an object at the top."""
    value = parse(text, where, kind, constants=constants)
    if not isinstance(value, dict):
        raise kind(f"{where}: must be a JSON object, found {type_name(value)}")
    return value


def type_name(value: object) -> str:
    """What JSON calls the type of a parsed value.

    >>> [type_name(v) for v in (None, True, 1, "a", [], {})]
    ['null', 'true or false', 'a number', 'a string', 'a list', 'an object']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else "a list"
