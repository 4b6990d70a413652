"""Bad indexes, and folders whose shards are not those of the index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.hostile import (
    INDEX,
    NORM,
    NOT_FILES,
    S1,
    S2,
    SHARD_OF,
    Case,
    Edit,
    content,
    replace,
    sparse,
)


def index(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "in" / INDEX
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


def mapped(value: object, tensor: str = NORM) -> Edit:
    return index(lambda document: document["weight_map"].update({tensor: value}))


def index_text(data: bytes | str) -> Edit:
    return content(f"in/{INDEX}", data)


def in_two_shards(folder: Path) -> None:
    shutil.copy(folder / "in" / S2, folder / "in" / "other.safetensors")
    mapped("other.safetensors", "another")(folder)


BAD_NAMES: dict[str, object] = {
    "..": "../x.safetensors",
    ".. inside": "a/../../x.safetensors",
    "a folder": "a/x.safetensors",
    "an absolute path": "/etc/x.safetensors",
    "a backslash": "..\\x.safetensors",
    "a drive": "C:x.safetensors",
    "NUL": "x\0.safetensors",
    "nothing": "",
    "a point": ".",
    "two points": "..",
    "5,000 characters": "x" * 5000 + ".safetensors",
    "300 characters": "x" * 300 + ".safetensors",
    "a pickle's ending": "pytorch_model.bin",
    "an escape": "\x1b[31m.safetensors",
    "a line break": "x\n.safetensors",
    "a number": 7,
    "null": None,
    "true": True,
    "a list": [S2],
    "an object": {"file": S2},
}
INDEXES: dict[str, tuple[Edit, str]] = {
    "empty": (index_text(""), "not valid JSON"),
    "cut short": (index_text('{"weight_map": {"a"'), "not valid JSON"),
    "not JSON": (index_text("weight_map = 7"), "not valid JSON"),
    "a page of a proxy": (index_text("<html>"), "HTML"),
    "a list": (index_text("[]"), "must be a JSON object"),
    "null": (index_text("null"), "must be a JSON object"),
    "BOM": (index_text(b"\xef\xbb\xbf" + json.dumps({"weight_map": SHARD_OF}).encode()), "BOM"),
    "UTF-16": (index_text(json.dumps({"weight_map": SHARD_OF}).encode("utf-16")), "UTF-8"),
    "deep": (index_text('{"weight_map": ' * 50_000), "nested too deeply"),
    "6,000 digits": (index_text('{"metadata": {"total_size": %s}}' % ("9" * 6000)), "digits"),
    "NaN": (index_text('{"metadata": {"total_size": NaN}}'), "NaN is not a JSON number"),
    "no map": (index(lambda d: d.pop("weight_map")), '"weight_map" must be an object'),
    "a map of nothing": (index(lambda d: d.update(weight_map={})), '"weight_map" must be an'),
    "a map that is a list": (index(lambda d: d.update(weight_map=[])), "found a list"),
    "a map that is text": (index(lambda d: d.update(weight_map=S1)), "found a string"),
    "a tensor twice": (
        index_text(f'{{"weight_map": {{"a": "{S1}", "a": "{S2}"}}}}'),
        'weight_map["a"] appears twice',
    ),
    "the map twice": (
        index_text('{"weight_map": {}, "weight_map": {}}'),
        "weight_map appears twice",
    ),
    "100 MB": (replace(f"in/{INDEX}", lambda p: sparse(p, 100_000_001)), "more than the"),
    "pointer of LFS": (index_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "a pickle": (index_text(b"\x80\x04."), "pickle"),
    **{name: (replace(f"in/{INDEX}", make), says) for name, (make, says) in NOT_FILES.items()},
}

INDEX_CASES = [
    *(Case(f"index: {name}", edit, (f"{INDEX}: ", says)) for name, (edit, says) in INDEXES.items()),
    *(
        Case(
            f"index with a name that is {name}",
            mapped(bad),
            (f'{INDEX}: weight_map["{NORM}"]', "expected the plain name"),
        )
        for name, bad in BAD_NAMES.items()
    ),
    Case(
        "index that names a shard that is not there",
        mapped("model-00003-of-00003.safetensors"),
        ("model-00003-of-00003.safetensors: shard is missing", "download"),
    ),
    Case(
        "index that names a tensor that is not there",
        mapped(S2, "model.new.weight"),
        (f"{INDEX}: model.new.weight: is not in {S2}", "download"),
    ),
    Case(
        "index that names another shard", mapped(S1), (f"{INDEX}: {NORM}: is in {S2}, not in {S1}",)
    ),
    Case(
        "a tensor in two shards, and no index",
        lambda folder: (in_two_shards(folder), (folder / "in" / INDEX).unlink()),
        (f"{NORM}: is in two shards, {S2} and", f"there is no {INDEX}", '"weight_map"'),
    ),
    Case(
        "stale index beside a single file",
        lambda folder: shutil.copy(folder / "in" / S1, folder / "in" / "model.safetensors"),
        ("model.safetensors: stands beside", "Remove the stale one"),
    ),
    Case(
        "no index, and a shard is lost",
        lambda folder: [(folder / "in" / name).unlink() for name in (S1, INDEX)],
        (f"{S1}: shard is missing", "download it"),
    ),
    Case(
        "index with an escape in the name of a tensor",
        mapped(7, "\x1b[31m\n"),
        (f'{INDEX}: weight_map["\\x1b[31m\\n"] is 7',),
    ),
    Case(
        "index on a disk that fails",
        replace(f"in/{INDEX}", lambda path: path.symlink_to("/proc/self/mem")),
        (f"{INDEX}: ", "Input/output error"),
        code=5,
    ),
    Case(
        "only pickles",
        lambda folder: [
            *((folder / "in" / name).unlink() for name in (S1, S2, INDEX)),
            (folder / "in" / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n."),
        ],
        ("no .safetensors files", "pytorch_model.bin"),
    ),
    Case(
        "no weights at all",
        lambda folder: [(folder / "in" / name).unlink() for name in (S1, S2, INDEX)],
        ("no .safetensors files", "no weights"),
    ),
]
