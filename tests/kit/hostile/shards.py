"""Bad shards and bad indexes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.hostile import (
    DOWN,
    GATE_UP,
    NORM,
    NOT_FILES,
    ROUTER,
    S1,
    S2,
    Case,
    Edit,
    Q,
    content,
    header_of,
    names_in,
    packed,
    replace,
    sparse,
    weights,
)

HEADER, END = header_of(names_in(S2))
TEXT, DATA = json.dumps(HEADER).encode(), weights(END)
WHOLE = packed(TEXT, DATA)
FIRST = len(WHOLE) - END  # where data starts


def shard(data: bytes) -> Edit:
    return content(f"in/{S2}", data)


def edited(change: Callable[[dict[str, Any]], object], data: bytes = DATA) -> Edit:
    header = json.loads(TEXT)
    change(header)
    return shard(packed(json.dumps(header).encode(), data))


def norm(**change: object) -> Edit:
    """Another entry of one tensor; ... removes a key."""

    def change_it(header: dict[str, Any]) -> None:
        entry = header[NORM] | change
        header[NORM] = {key: value for key, value in entry.items() if value is not ...}

    return edited(change_it)


def text(old: str, new: str) -> Edit:
    assert old in TEXT.decode()
    return shard(packed(TEXT.decode().replace(old, new, 1).encode(), DATA))


def raw_offset(end: str) -> Edit:
    return text('"data_offsets": [0, 128]', f'"data_offsets": [0, {end}]')


def shifted(header: dict[str, Any]) -> None:
    for entry in header.values():
        entry["data_offsets"] = [position + 8 for position in entry["data_offsets"]]


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


CUT = {
    "to nothing": 0,
    "to 1 byte": 1,
    "to 7 bytes": 7,
    "to its length": 8,
    "to 1 byte of header": 9,
    "in the header": FIRST // 2,
    "before the last byte of the header": FIRST - 1,
    "before the data": FIRST,
    "after a byte of data": FIRST + 1,
    "in the data": FIRST + END // 2,
    "before the last byte": len(WHOLE) - 1,
}
LENGTH = {
    "0": 0,
    "1": 1,
    "one less": len(TEXT) - 1,
    "one more": len(TEXT) + 1,
    "the whole file": len(WHOLE),
    "2^31": 2**31,
    "2^63": 2**63,
    "2^64-1": 2**64 - 1,
}
ENTRY: dict[str, tuple[Edit, str]] = {
    "offsets overlap": (norm(data_offsets=[64, 192]), "starts at byte"),
    "offsets with a hole before": (
        edited(shifted, DATA + bytes(8)),
        "starts at byte",
    ),
    "offsets of another tensor": (norm(data_offsets=HEADER[Q]["data_offsets"]), "needs 128 bytes"),
    "offsets reversed": (norm(data_offsets=[128, 0]), "needs 128 bytes"),
    "offsets negative": (norm(data_offsets=[-128, 0]), "not two positions"),
    "offsets of floats": (norm(data_offsets=[0.0, 128.0]), "not two positions"),
    "offsets of text": (norm(data_offsets=["0", "128"]), "not two positions"),
    "offsets true": (norm(data_offsets=[False, True]), "not two positions"),
    "offsets null": (norm(data_offsets=None), "not two positions"),
    "offsets missing": (norm(data_offsets=...), "not two positions"),
    "offsets of three": (norm(data_offsets=[0, 64, 128]), "not two positions"),
    "offsets of 2^64": (norm(data_offsets=[2**64, 2**64 + 128]), "not two positions"),
    "offsets 1e2": (raw_offset("1.28e2"), "not two positions"),
    "shape too small": (norm(shape=[63]), "needs 126 bytes"),
    "shape too large": (norm(shape=[65]), "needs 130 bytes"),
    "shape that overflows": (norm(shape=[2**62, 2**62, 4]), "needs more than the 8832 bytes"),
    "shape of 10,000 sizes": (norm(shape=[2] * 10_000), "needs more than the 8832 bytes"),
    "shape negative": (norm(shape=[-64]), "not a list of sizes"),
    "shape of two negatives": (norm(shape=[-8, -8]), "not a list of sizes"),
    "shape 2^64": (norm(shape=[2**64]), "not a list of sizes"),
    "shape of 4,000 digits": (norm(shape=[10**4000]), "not a list of sizes"),
    "shape of floats": (norm(shape=[64.0]), "not a list of sizes"),
    "shape of text": (norm(shape="64"), "not a list of sizes"),
    "shape null": (norm(shape=None), "not a list of sizes"),
    "shape missing": (norm(shape=...), "not a list of sizes"),
    "shape nested": (norm(shape=[[64]]), "not a list of sizes"),
    "shape true": (norm(shape=[True, 64]), "not a list of sizes"),
    "dtype unknown": (norm(dtype="F2"), 'dtype "F2" is unknown'),
    "dtype in small letters": (norm(dtype="bf16"), 'dtype "bf16" is unknown'),
    "dtype null": (norm(dtype=None), "dtype null is unknown"),
    "dtype missing": (norm(dtype=...), "dtype null is unknown"),
    "dtype a list": (norm(dtype=["BF16"]), "is unknown"),
    "dtype of half a byte": (norm(dtype="F4", shape=[255]), "needs 127.5 bytes"),
    "dtype with an escape": (
        norm(dtype="\x1b]0;owned\x07"),
        'dtype "\\x1b]0;owned\\x07" is unknown',
    ),
    "entry null": (edited(lambda h: h.update({NORM: None})), "is null"),
    "entry a list": (edited(lambda h: h.update({NORM: []})), "is a list"),
    "entry text": (edited(lambda h: h.update({NORM: "BF16"})), "is a string"),
}
FILES: dict[str, tuple[Edit, str]] = {
    "offsets past the end": (
        edited(lambda h: h[ROUTER].update(data_offsets=[10**9, 10**9 + 512])),
        f"{ROUTER}: starts at byte",
    ),
    "trailing byte": (shard(WHOLE + b"\0"), "holds 8833 bytes of tensors"),
    "trailing page": (shard(WHOLE + bytes(4096)), "bytes of tensors"),
    "100 MB of header": (
        replace(f"in/{S2}", lambda p: sparse(p, 200_000_000, (100_000_001).to_bytes(8, "little"))),
        "claims 100000001",
    ),
    "10 GB of header": (
        replace(f"in/{S2}", lambda p: sparse(p, 10**10 + 8, (10**10).to_bytes(8, "little"))),
        "claims 10000000000",
    ),
    "zeros": (shard(bytes(len(WHOLE))), "header claims 0"),
    "header of NUL": (shard(packed(bytes(999), DATA)), "header: is not valid JSON"),
    "header that is not JSON": (shard(packed(b"{'a': 1}", DATA)), "header: is not valid JSON"),
    "header of nothing": (shard(packed(b"        ", DATA)), "header: is not valid JSON"),
    "header that is not UTF-8": (shard(packed(TEXT.replace(b"norm", b"n\xffrm"), DATA)), "UTF-8"),
    "header with a BOM": (shard(packed(b"\xef\xbb\xbf" + TEXT, DATA)), "BOM"),
    "header in UTF-16": (shard(packed(TEXT.decode().encode("utf-16"), DATA)), "UTF-8"),
    "header a list": (shard(packed(b"[%s]" % TEXT, DATA)), "header: must be a JSON object"),
    "header null": (shard(packed(b"null", DATA)), "header: must be a JSON object"),
    "header a number": (shard(packed(b"7", DATA)), "header: must be a JSON object"),
    "header of no tensors": (shard(packed(b"{}", DATA)), "its header describes 0"),
    "header of two objects": (shard(packed(TEXT + TEXT, DATA)), "header: is not valid JSON"),
    "deep lists": (shard(packed(b"[" * 90_000, DATA)), "nested too deeply"),
    "deep objects": (shard(packed(b'{"a":' * 90_000, DATA)), "nested too deeply"),
    "deep entry": (
        text('"shape": [64]', f'"shape": {"[" * 5000}{"]" * 5000}'),
        "nested too deeply",
    ),
    "6,000 digits": (raw_offset("9" * 6000), "digits"),
    "NaN": (raw_offset("NaN"), "NaN is not a JSON number"),
    "1e400": (raw_offset("1e400"), "not two positions"),
    "a tensor twice": (
        shard(packed(b"%s,%s" % (TEXT[:-1], TEXT[1:]), DATA)),
        f"{NORM} appears twice",
    ),
    "a key twice": (
        text('"dtype": "BF16",', '"dtype": "BF16", "dtype": "F16",'),
        '["dtype"] appears twice',
    ),
    "metadata twice": (
        text("{", '{"__metadata__": {}, "__metadata__": {"a": "b"}, '),
        "__metadata__ appears twice",
    ),
    "a key of metadata twice": (
        text("{", '{"__metadata__": {"a": "a", "a": "b"}, '),
        '__metadata__["a"] appears twice',
    ),
    "metadata a number": (edited(lambda h: h.update(__metadata__=7)), "__metadata__ must map text"),
    "metadata null": (edited(lambda h: h.update(__metadata__=None)), "__metadata__ must map text"),
    "metadata nested": (edited(lambda h: h.update(__metadata__={"a": {}})), "__metadata__"),
    "a page of a proxy": (shard(b"<!DOCTYPE html>\n<html><head><title>407</title>" * 99), "HTML"),
    "a pointer of LFS": (
        shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "Git LFS",
    ),
    "a pickle": (shard(b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR." + bytes(999)), "pickle"),
    "a zip of torch.save": (shard(b"PK\x03\x04\0\0\x08\x08" + bytes(999)), "torch.save"),
    "gzip": (shard(b"\x1f\x8b\x08\0\0\0\0\0" + bytes(999)), "not a safetensors file"),
    "GGUF": (shard(b"GGUF\x03\0\0\0" + bytes(999)), "is a GGUF file"),
    "a socket": (replace(f"in/{S2}", a_socket), "not a regular file"),
    "missing": (lambda folder: (folder / "in" / S2).unlink(), "is missing"),
    **{name: (replace(f"in/{S2}", make_it), says) for name, (make_it, says) in NOT_FILES.items()},
}
NAMES = {
    "an escape in a name": ("\x1b[2J\x1b[31mevil\x07", "\\x1b[2J\\x1b[31mevil\\x07"),
    "a line break in a name": ("a\nmoe-ckpt: error: b", "a\\nmoe-ckpt: error: b"),
    "a carriage return and C1 in a name": ("a\r\x9b31mb", "a\\r\\x9b31mb"),
    "an override of direction in a name": ("a\u202eb\u2066", "a\\u202eb\\u2066"),
    "a name of 200 kB": ("n" * 200_000, "n" * 190),
    "percents and braces in a name": ("%s%n{0}{name}", "%s%n{0}{name}"),
    "a name of nothing": ("", ": : dtype"),
}

SHARD_CASES = [
    *(
        Case(f"shard cut {name}", shard(WHOLE[:size]), (f"{S2}: ", "download"))
        for name, size in CUT.items()
    ),
    *(
        Case(f"shard whose header has length {name}", shard(packed(TEXT, DATA, length)), (S2,))
        for name, length in LENGTH.items()
    ),
    *(
        Case(f"shard: {name}", edit, (f"{S2}: {NORM}: ", says, "download"))
        for name, (edit, says) in ENTRY.items()
    ),
    *(Case(f"shard: {name}", edit, (f"{S2}: ", says)) for name, (edit, says) in FILES.items()),
    *(
        Case(
            f"shard: {name}",
            edited(lambda h, bad=bad: h.update({bad: {"dtype": "F2"}})),
            (f"{S2}: ", says),
        )
        for name, (bad, says) in NAMES.items()
    ),
    Case(
        "shard: a name that is not Unicode",
        text(f'"{NORM}"', '"\\ud800"'),
        (f"{S2}: \\ud800: ", "not valid Unicode"),
    ),
    Case(
        "shard on a disk that fails",
        replace(f"in/{S2}", lambda path: path.symlink_to("/proc/self/mem")),
        (f"{S2}: ", "Input/output error"),
        code=5,
    ),
    Case(
        "both shards",
        both(shard(b"x"), content(f"in/{S1}", b"")),
        (f"{S1}: ", "cut short"),
    ),
    Case(
        "experts of F64",
        content(
            f"in/{S1}",
            packed(json.dumps(header_of(names_in(S1), "F64")[0]).encode(), bytes(8 * 24576)),
        ),
        ("experts", "F64", "expected BF16, F16 or F32"),
    ),
    Case(
        "experts of no rows",
        content(
            f"in/{S1}",
            packed(
                json.dumps(
                    {
                        GATE_UP: {"dtype": "BF16", "shape": [4, 0, 64], "data_offsets": [0, 0]},
                        DOWN: {"dtype": "BF16", "shape": [4, 64, 0], "data_offsets": [0, 0]},
                    }
                ).encode()
            ),
        ),
        (GATE_UP, "[4, 0, 64]"),
    ),
]
