"""Folders that cannot be read from or written to, options that make no sense, bad weights."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from kit.hostile import (
    DOWN,
    GATE_UP,
    NBYTES,
    S1,
    Case,
    Edit,
    content,
    header_of,
    json_bytes,
    names_in,
    packed,
)


def link(name: str, target: str) -> Edit:
    return lambda folder: (folder / name).symlink_to(target)


def nothing(_: Path) -> None:
    """The checkpoint stays sound: what is asked for is wrong."""


def holding(**files: str) -> Edit:
    """An output folder with files, ``__`` for a point and ``/``."""

    def edit(folder: Path) -> None:
        for name, text in files.items():
            path = folder / "out" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return edit


def out_is(make_it: Callable[[Path], object]) -> Edit:
    return lambda folder: make_it(folder / "out")


def in_is(make_it: Callable[[Path], object]) -> Edit:
    return lambda folder: make_it(folder / "other")


OVERLAPS = {
    "the input": "in",
    "the input by ..": "in/../in",
    "the input by a link": "link",
    "in the input": "in/out",
    "in the input by a link": "link/deep/out",
    "the parent of the input": ".",
    "a link to the parent of the input": "up",
}
OUTPUTS: dict[str, tuple[Edit, str]] = {
    "a file": (out_is(lambda path: path.write_text("mine")), "is not a folder"),
    "a FIFO": (out_is(os.mkfifo), "is not a folder"),
    "a device": (out_is(lambda path: path.symlink_to("/dev/null")), "is not a folder"),
    "a dangling link": (out_is(lambda path: path.symlink_to("gone")), "is not a folder"),
    "a link to itself": (out_is(lambda path: path.symlink_to("out")), "is not a folder"),
    "not empty": (holding(**{"notes.txt": "mine"}), "is not empty (notes.txt)"),
    "not empty, hidden": (holding(**{".notes": "mine"}), "is not empty (.notes)"),
    "not empty, deep": (holding(**{"a/b/notes": "mine"}), "is not empty (a/b/notes)"),
    "not empty, a link": (
        lambda folder: [(folder / "out").mkdir(), (folder / "out/x").symlink_to("../in")],
        "is not empty (x)",
    ),
    "another model": (
        holding(**{"config.json": "{}", "model.safetensors": "x"}),
        "is not empty (config.json, model.safetensors)",
    ),
    "a file with an escape in its name": (holding(**{"\x1b[31m\n": ""}), "(\\x1b[31m\\n)"),
    "a broken record": (holding(**{".moe-ckpt/written.json": "[["}), "not empty"),
}
INPUTS: dict[str, tuple[Edit, str]] = {
    "missing": (nothing, "is not a folder"),
    "a file": (in_is(lambda path: path.write_text("x")), "is not a folder"),
    "a FIFO": (in_is(os.mkfifo), "is not a folder"),
    "a dangling link": (in_is(lambda path: path.symlink_to("gone")), "is not a folder"),
    "a link to itself": (in_is(lambda path: path.symlink_to("other")), "is not a folder"),
    "empty": (in_is(Path.mkdir), "config.json: is missing"),
}
USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "format": (("--format", "int3"), "format"),
    "format with an escape": (("--format", "\x1b[31m\n"), "\\x1b[31m"),
    "format that needs statistics": (("--format", "fp8-tensor"), "needs --stats FILE"),
    "quantize": (("--quantize", "some"), "--quantize"),
    "dialect": (("--dialect", "gguf"), "dialect"),
    "layout": (("--layout", "rows"), "--layout"),
    "order": (("--gate-up-order", "mixed"), "--gate-up-order"),
    "experts": (("--experts", "some"), "--experts"),
    "statistics": (("--missing-stats", "guess"), "--missing-stats"),
    "cache": (("--kv-cache", "int8"), "--kv-cache"),
    "cache without statistics": (("--kv-cache", "fp8"), "--stats FILE"),
    "recipe and format": (("--recipe", "x.toml", "--format", "nvfp4"), "--recipe"),
    "shards of nothing": (("--max-shard-size", "0"), "number of bytes"),
    "shards of text": (("--max-shard-size", "large"), "number of bytes"),
    "shards of 5,000 digits": (("--max-shard-size", "9" * 5000), "number of bytes"),
    "memory": (("--memory", "-1GB"), "number of bytes"),
    "workers": (("--workers", "0"), "--workers 0: expected 1 to 256"),
    "too many workers": (("--workers", "257"), "--workers 257: expected 1 to 256"),
    "device": (("--device", "tpu"), "device"),
}

PATH_CASES = [
    *(
        Case(
            f"output is {name}",
            lambda folder: [link("link", "in")(folder), link("up", ".")(folder)],
            ("overlaps the input", "choose a folder outside it"),
            code=4,
            out_dir=out_dir,
        )
        for name, out_dir in OVERLAPS.items()
    ),
    *(
        Case(f"output is {name}", edit, ("out: ", says), code=4)
        for name, (edit, says) in OUTPUTS.items()
    ),
    Case("output is in a file", nothing, ("stats.json/out: ",), code=4, out_dir="stats.json/out"),
    Case("output has a long name", nothing, ("xxx", "too long"), code=4, out_dir="x" * 300),
    Case("output has a long path", nothing, ("x/x/x", "too long"), code=4, out_dir="x/" * 3000),
    *(
        Case(f"input is {name}", edit, ("other", says), in_dir="other")
        for name, (edit, says) in INPUTS.items()
    ),
    Case("input is missing, with an escape", nothing, ("\\x1b[31m\\n: ",), in_dir="\x1b[31m\n"),
    Case("input has a long name", nothing, ("xxx",), in_dir="x" * 300),
    Case("input has a long path", nothing, ("x/x/x",), in_dir="x/" * 3000),
    *(
        Case(f"usage: {name}", nothing, (says,), code=2, args=args)
        for name, (args, says) in USAGE.items()
    ),
]


def items(dtype: str, value: float) -> bytes:
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F16": "<e", "F32": "<f"}[dtype], value)


def spoilt(dtype: str, name: str, position: int, value: float) -> Edit:
    """One weight of a tensor is this value, in a checkpoint of this dtype; -1 is the last."""
    header, end = header_of(names_in(S1), dtype)
    data = bytearray(items(dtype, 0.5) * (end // NBYTES[dtype]))
    start, stop = header[name]["data_offsets"]
    nbytes = NBYTES[dtype]
    at = start + position * nbytes if position >= 0 else stop + position * nbytes
    data[at : at + nbytes] = items(dtype, value)
    return content(f"in/{S1}", packed(json_bytes(header), bytes(data)))


NAN, INF = float("nan"), float("inf")
WHERE = {  # tensor, position -> what the message says
    (GATE_UP, 0): ("expert 0", "row 0, column 0"),
    (GATE_UP, 2 * 64 * 64 + 7 * 64 + 9): ("expert 2", "row 7, column 9"),
    (GATE_UP, -1): ("expert 3", "row 63, column 63"),
    (DOWN, 0): ("expert 0", "row 0, column 0"),
    (DOWN, 64 * 32 + 5): ("expert 1", "row 0, column 5"),
    (DOWN, -1): ("expert 3", "row 63, column 31"),
}
WEIGHT_CASES = [
    *(
        Case(
            f"a weight too large for {number_format}",
            spoilt("BF16", GATE_UP, 7, 3.3e38),
            (f"{S1}: {GATE_UP}[expert 0]", "weight is 3.29", number_format, "choose another"),
            args=("--format", number_format),
            is_late=True,
        )
        for number_format in ("mxfp4", "mxfp8", "int4-g32", "int8-channel")
    ),
    *(
        Case(
            f"{value} in {dtype} {name.rpartition('.')[2]} at {position}",
            spoilt(dtype, name, position, value),
            (f"{S1}: {name}[{says[0]}]", f"weight is {value} at {says[1]}", "NaN or infinite"),
            is_late=True,
        )
        for dtype in ("BF16", "F16", "F32")
        for value in (NAN, INF, -INF)
        for (name, position), says in WHERE.items()
    ),
]
