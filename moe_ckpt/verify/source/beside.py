"""Whether what lies beside the weights is that of the source: config.json and side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...dialects.config import CONFIG, without_quantization
from ...errors import InputError, show
from ...layouts.config_keys import complete_config
from ...source.checkpoint import SideFile, Source
from ...source.files import open_regular
from ...source.strict_json import parse_object
from ..findings import Findings
from ..subject import Subject

__all__ = ["check_config_json", "check_side_files", "name_left_out"]

_PIECE_NBYTES = 1 << 20
_JSON_CAP_NBYTES = 100_000_000

# What tools write anew whenever they save a model.
_OF_THE_TOOL = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})
# What runtimes read beside the weights; tools leave out the rest, such as the README.
_READ_BY_RUNTIMES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_NOT_THERE = object()


def check_config_json(subject: Subject, source: Source, findings: Findings) -> None:
    """All keys but those of quantization must be as they were.

    What tools other than ours write anew, and keys they add, are theirs to say.
    """
    wanted, found = (without_quantization(c) for c in (source.config, subject.config))
    if not found:
        return  # it could not be read, which is a finding already
    completed = complete_config(source.config, source.tensors.keys()).config
    remain = {path for path, _, _ in _differences(without_quantization(completed), found)}
    for path, before, now in _differences(wanted, found):
        if path not in remain:
            continue  # a key that the source lacks and runtimes ask for
        if not subject.is_ours and (before is _NOT_THERE or path.split(".")[-1] in _OF_THE_TOOL):
            continue
        what = "is missing" if now is _NOT_THERE else f"is {show(repr(now))}"
        there = "is not there" if before is _NOT_THERE else f"has {show(repr(before))}"
        findings.add(
            "source",
            f"{CONFIG}: {show(path)}",
            f"{what}, and the source {there}",
            "runtimes build another model than the source's",
        )


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key, _NOT_THERE), now.get(key, _NOT_THERE), below)
    elif type(before) is not type(now) or before != now:
        yield path, before, now


def check_side_files(subject: Subject, source: Source, findings: Findings) -> None:
    """Tokenizer, chat template and the like must be there, with the same content.

    Other tools may have written JSON anew, if it says the same.
    """
    for file in source.side_files:
        if not subject.is_ours and file.path.suffix not in _READ_BY_RUNTIMES:
            continue
        findings.counts["side files"] += 1
        problem = _problem_with(subject.root / file.name, file, is_ours=subject.is_ours)
        if problem:
            effect = "runtimes tokenize, prompt or generate otherwise than with the source"
            findings.add("source", show(file.name), problem, effect)


def name_left_out(subject: Subject, source: Source, findings: Findings) -> None:
    """Name what conversions leave out of the source, as far as it is not there after all."""
    findings.left_out = tuple(
        name for name in source.left_out if not (subject.root / name).exists()
    )


def _problem_with(there: Path, file: SideFile, *, is_ours: bool) -> str:
    if not there.exists():
        return "is missing"
    try:
        if _is_same(there, file.path):
            return ""
    except InputError as error:
        return str(error)
    if not is_ours and file.path.suffix == ".json":
        try:
            before, now = (_object(path) for path in (file.path, there))
        except InputError:
            return "is not that of the source"
        changed = [path for path, *_ in _differences(before, now) if path not in _OF_THE_TOOL]
        return f"differs from the source's in {', '.join(map(show, changed[:5]))}" * bool(changed)
    return "is not that of the source"


def _object(path: Path) -> dict[str, Any]:
    text = path.read_bytes()[:_JSON_CAP_NBYTES]
    return parse_object(text, path.name, InputError, constants=True)


def _is_same(one: Path, two: Path) -> bool:
    fd, status = open_regular(one, InputError)
    with open(fd, "rb") as found, two.open("rb") as wanted:
        if status.st_size != two.stat().st_size:
            return False
        while True:
            piece = wanted.read(_PIECE_NBYTES)
            if piece != found.read(_PIECE_NBYTES):
                return False
            if not piece:
                return True
