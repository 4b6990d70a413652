"""Regular expressions of strangers: refused if matching one could take forever."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["problem_with"]

_MOST_REPEATS = 6  # of unbounded ones; matching takes at most a power of that many


def problem_with(expression: str) -> str:
    """Why an expression is not used, '' if it is.

    >>> problem_with(r".*[.]mlp[.]gate$"), problem_with("(a+)+$")
    ('', 'repeats what repeats itself, which can take forever')
    """
    try:
        compiled = re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error}"
    parser: Any = re._parser  # type: ignore[attr-defined]
    depth, count = _unbounded(parser.parse(compiled.pattern))
    if depth > 1:
        return "repeats what repeats itself, which can take forever"
    if count > _MOST_REPEATS:
        return f"has {count} repeats without a bound, which can take forever"
    return ""


def _unbounded(parsed: Any) -> tuple[int, int]:
    """How deep unbounded repeats are nested, and how many there are."""
    depth = count = 0
    todo = [(item, 0) for item in parsed]
    while todo:
        item, outside = todo.pop()
        if not isinstance(item, (tuple, list)) and not hasattr(item, "data"):
            continue
        inside = outside
        if isinstance(item, tuple) and len(item) == 2 and str(item[0]).endswith("_REPEAT"):
            _, most, _ = item[1]
            if most == re._constants.MAXREPEAT or most > 1000:  # type: ignore[attr-defined]
                inside, count = outside + 1, count + 1
                depth = max(depth, inside)
        todo += [(inner, inside) for inner in item]
    return depth, count
