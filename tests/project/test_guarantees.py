"""The promises in docs/guarantees.md name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text()
FILES = {path.name: path for path in TESTS.rglob("test_*.py")}


def test_every_promise_has_a_test():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "promise" not in line]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row.split(" | ")[-1])
        assert named, row
        for file, test in named:
            source = FILES[file].read_text()
            assert not test or f"\ndef {test}(" in source, f"{file}::{test}"
