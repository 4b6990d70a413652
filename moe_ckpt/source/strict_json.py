"""JSON from strangers: duplicate keys, wrong encodings and oversized files are errors."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from itertools import islice
from typing import Any

from ..errors import InputError, show
from .files import impostor

__all__ = ["parse", "parse_object", "show_value", "type_name"]

# How many objects, lists and values a text may have: as Python's objects they take up to 230, 90
# and 60 bytes. A header of a million tensors has 1, 2 and 5 million.
_CAPS = {b"{": 2_000_000, b"[": 4_000_000, b",": 12_000_000}
_SEARCHED_NBYTES = 10_000_000
_SHOWN_ITEMS = 6
_DOWNLOAD = "download it again"


class _DuplicateKeyError(Exception):
    pass


class _Pairs(list[tuple[str, Any]]):
    """An object with all its keys, those that appear twice too."""


def _path_of_duplicate(text: bytes, key: str) -> str:
    """Where the first key that an object has twice stands, such as ``modules["a"]["b"]``.

    Or only the key, of what is too large to search, or broken behind it.
    """
    todo: list[tuple[str, Any]] = []
    with suppress(ValueError, RecursionError):
        if len(text) <= _SEARCHED_NBYTES:
            todo.append(("", json.loads(text, object_pairs_hook=_Pairs)))
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
    return show(key)


def parse(
    text: bytes,
    where: str,
    kind: type[InputError],
    *,
    constants: bool = False,
    remedy: str = _DOWNLOAD,
) -> Any:
    """Parse JSON; ``where`` starts every message, ``remedy`` ends it.

    Duplicate keys are refused, and so are NaN and Infinity unless ``constants`` is true.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise _DuplicateKeyError(next(key for key in counts if counts[key] > 1))
        return found

    def wrong(what: str) -> InputError:
        return kind(f"{where}: {what}; {remedy}")

    def refuse(constant: str) -> float:
        raise wrong(f"{constant} is not a JSON number")

    if what_it_is := impostor(text[:64]):
        raise kind(f"{where}: {what_it_is}")
    if any(text.count(mark) > cap for mark, cap in _CAPS.items()):
        raise wrong("holds millions of values")
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=None if constants else refuse,
        )
    except _DuplicateKeyError as error:
        raise wrong(f"{_path_of_duplicate(text, str(error))} appears twice") from None
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise wrong(f"is not UTF-8 text, from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg}: line {error.lineno} column {error.colno}"
        if text.startswith(b"\xef\xbb\xbf"):
            reason = "it starts with a byte order mark (BOM)"
        raise wrong(f"is not valid JSON: {show(reason)}") from None
    except ValueError:  # Python refuses to read such an integer
        raise wrong("is not valid JSON: a number has more digits than any needs") from None


def parse_object(
    text: bytes,
    where: str,
    kind: type[InputError],
    *,
    constants: bool = False,
    remedy: str = _DOWNLOAD,
) -> dict[str, Any]:
    """Parse JSON that must be an object at the top."""
    value = parse(text, where, kind, constants=constants, remedy=remedy)
    if not isinstance(value, dict):
        raise kind(f"{where}: must be a JSON object, found {type_name(value)}; {remedy}")
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


def show_value(value: object) -> str:
    """A parsed value as JSON, safe to print and short, however large it is.

    >>> show_value({"a": [None, True, 1.5], "b": "x"}), show_value([1] * 700)
    ('{"a": [null, true, 1.5], "b": "x"}', '[1, 1, 1, 1, 1, 1, ... 700 in all]')
    """
    return show(_short(value, 2))


def _short(value: object, depth: int) -> str:
    if isinstance(value, str):
        return f'"{show(value)}"'
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if not isinstance(value, (list, dict)):
        return str(value)
    begin, end = "{}" if isinstance(value, dict) else "[]"
    if depth == 0 and value:
        return f"{begin}...{end}"
    if isinstance(value, dict):
        first = islice(value.items(), _SHOWN_ITEMS)
        shown = [f'"{show(key)}": {_short(inner, depth - 1)}' for key, inner in first]
    else:
        shown = [_short(inner, depth - 1) for inner in value[:_SHOWN_ITEMS]]
    if len(value) > _SHOWN_ITEMS:
        shown.append(f"... {len(value)} in all")
    return f"{begin}{', '.join(shown)}{end}"
