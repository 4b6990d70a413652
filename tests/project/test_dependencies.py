"""What pyproject.toml promises about versions is what is tried."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    """The versions of a file of constraints."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def numbers(version):
    """A version in numbers, without zeros at its end: 8.2 is 8.2.0."""
    found = [int(part) for part in version.split(".")]
    while found[-1] == 0:
        found.pop()
    return found


def promised():
    """The oldest version of all that the package, with or without numba, needs."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["fast"]]
    return {name: numbers(version) for name, version in (line.split(">=") for line in lines)}


def test_the_oldest_versions_are_those_that_are_tried():
    assert {name: numbers(version) for name, version in pins("floors.txt").items()} == promised()


def test_what_is_tested_is_not_older_than_what_is_promised():
    tested = pins("constraints.txt")
    for name, floor in promised().items():
        assert numbers(tested[name]) >= floor


def test_every_extra_is_pinned():
    tested = {name.lower().replace("_", "-") for name in pins("constraints.txt")}
    extras = PROJECT["optional-dependencies"].values()
    needed = {re.split("[>=]", line)[0] for lines in extras for line in lines}
    assert needed <= tested


def test_pythons_that_are_named_are_those_that_are_tried():
    """The oldest runs the suite; .ci/run tries the others where they are installed."""
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={named[0]}"
    tried = re.search(r"for version in (.*); do", (ROOT / ".ci" / "run").read_text())
    assert tried is not None
    assert tried[1].split() == named[1:]
