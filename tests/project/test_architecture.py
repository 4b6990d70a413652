"""Imports go one way, without a circle, and a name says which room it is in."""

from __future__ import annotations

import ast
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

import moe_ckpt

PACKAGE = Path(moe_ckpt.__file__).parent

# From the bottom to the top: a room imports from itself and from the lines above its own.
ORDER = (
    ("errors", "dtypes", "runtimes", "version", "words"),
    ("faults",),
    ("limits", "formats"),
    ("dialects",),
    ("source",),
    ("layouts", "kernels"),
    ("loaders", "engines"),
    ("origin",),
    ("plan",),
    ("texts", "result"),
    ("planning",),
    ("work", "output"),
    ("verify",),
    ("conversion", "scan"),
    ("repairing",),
    ("report",),
    ("inspection",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# Modules that are called alike because they are alike.
ALIKE = {
    "__init__",
    "table",  # the rows of formats, of families, of each dialect
    "write",  # the three things that each dialect does
    "read",
    "match",
}


def modules_in(package: Path) -> dict[str, Path]:
    """Dotted names below the package -> files; a folder goes by its ``__init__``."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports, in functions and for types too."""
    inside = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    inside = [] if name == "__init__" else inside
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                found.add((rest or "__init__") if top == "moe_ckpt" else "")
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (node.module or "").split(".")
        if node.level:
            base = [*inside[: len(inside) - node.level + 1], *base]
        elif base.pop(0) != "moe_ckpt":
            continue
        parent = ".".join(part for part in base if part)
        for alias in node.names:
            module = f"{parent}.{alias.name}" if parent else alias.name
            found.add(module if module in known else parent or "__init__")
    return found - {name, ""}


def graph_of(package: Path) -> dict[str, set[str]]:
    known = modules_in(package)
    return {name: imports_of(name, path, known) for name, path in known.items()}


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room that stands above."""
    found = []
    for name, imported in graph.items():
        room = name.partition(".")[0]
        for other in imported:
            there = other.partition(".")[0]
            if there != room and RANK[there] >= RANK[room]:
                found.append(f"{name} -> {other}")
    return sorted(found)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        reached[start] = seen
    return [
        sorted(other for other in graph if name in reached[other] and other in reached[name])
        for name in graph
        if name in reached[name]
    ]


def test_every_room_has_a_place_in_the_order():
    assert {name.partition(".")[0] for name in modules_in(PACKAGE)} == set(RANK)


def test_imports_go_down():
    assert arrows_up(graph_of(PACKAGE)) == []


def test_no_circle():
    assert circles(graph_of(PACKAGE)) == []


@pytest.mark.parametrize(
    ("module", "line", "arrow"),
    [
        ("source/headers.py", "from ..plan import Plan", "source.headers -> plan"),
        ("work/pool.py", "from ..report.text import size", "work.pool -> report.text"),
        ("formats/nvfp4.py", "from ..dialects import DIALECTS", "formats.nvfp4 -> dialects"),
        ("source/headers.py", "import moe_ckpt.plan", "source.headers -> plan"),
        ("source/headers.py", "from moe_ckpt.plan import Plan", "source.headers -> plan"),
        ("source/headers.py", "from .. import make_plan", "source.headers -> __init__"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path, module, line, arrow):
    shutil.copytree(PACKAGE, tmp_path / "moe_ckpt")
    with (tmp_path / "moe_ckpt" / module).open("a") as file:
        file.write(f"\n\ndef late():\n    {line}\n")
    assert arrow in arrows_up(graph_of(tmp_path / "moe_ckpt"))


def test_a_planted_circle_is_found(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "moe_ckpt")
    with (tmp_path / "moe_ckpt" / "output" / "journal.py").open("a") as file:
        file.write("\n\nfrom .writer import OutputFolder\n")
    found = circles(graph_of(tmp_path / "moe_ckpt"))
    assert any({"output.journal", "output.writer"} <= set(circle) for circle in found)


def test_no_name_stands_in_two_rooms():
    rooms = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in ALIKE:
            rooms[path.stem].add(path.relative_to(PACKAGE).parent.as_posix())
    assert {name: where for name, where in rooms.items() if len(where) > 1} == {}


# Those who import by name: what a table says, and what the package offers at its top.
BY_NAME = {"__init__", "formats.format", "verify"}


def test_nothing_is_imported_by_a_text_that_this_test_cannot_read():
    found = {
        name for name, path in modules_in(PACKAGE).items() if "import_module" in path.read_text()
    }
    assert found == BY_NAME


def test_a_module_is_one_thought():
    """Of 400 lines at most, but for the table of families."""
    lines = {name: len(path.read_text().splitlines()) for name, path in modules_in(PACKAGE).items()}
    assert {name for name, count in lines.items() if count > 400} == {"layouts.table"}
