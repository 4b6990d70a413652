"""Mutated headers, indexes, configs and statistics: read as the library reads them, or refused.

By default each mutator tries as many as take some seconds; MOE_CKPT_FUZZ is how many times that.
Mutations follow from a seed, MOE_CKPT_FUZZ_SEED, and a failure shows the bytes that caused it.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from kit.hostile import CONFIG, INDEX, S1, S2, SHARD_OF, header_of, make, names_in, packed, weights
from safetensors import SafetensorError, deserialize

import moe_ckpt
from moe_ckpt.errors import CheckpointError, InputError
from moe_ckpt.planning.stats import read_stats
from moe_ckpt.source.headers import read_header

TIMES = int(os.environ.get("MOE_CKPT_FUZZ", "1"))
SEED = int(os.environ.get("MOE_CKPT_FUZZ_SEED", "0"))
# Python's objects for a text take up to 100 times its bytes; what is not text has its own size.
LARGEST_PEAK = 4 << 20

TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b" ",
        b"\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"0", b"1", b"-1", b"1.0", b"1e5", b"1e309", b"9" * 20, b"9" * 5000, b"0x1", b"01", b"-0"),
    *(b"true", b"false", b"null", b"NaN", b"Infinity", b"-Infinity", b'""', b"[]", b"{}", b"[[]]"),
    *(b"[" * 2000, b'{"a":' * 2000, b'"\\ud800"', b'"\\u0000"', b'"\\u001b[31m"', b"4294967296"),
    *(b"18446744073709551615", b"9223372036854775807", b"9223372036854775808", b"[2,2,2,2,2,2]"),
    *(
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"__metadata__"',
        b'"BF16"',
        b'"F4"',
        b'"F8_E8M0"',
    ),
    *(b'"weight_map"', b'"modules"', b'"input_amax"', b'"text_config"', b'"num_experts"'),
    *(b'"quantization_config"', b'"quant_method"', b'"config_groups"', b'"model_type"', b'"../x"'),
]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 4, 64, 2**31, 2**63, 10**30, 10**4000, 0.5, 1e300, "", "4"),
    *([], {}, [[]], [4], [4, 4], {"a": 1}, "BF16", "\x1b[31m", "x" * 300, "fp8", "modelopt"),
    *(float("nan"), float("inf"), ["fp8"], {"quant_method": "fp8"}, list(range(99)), S1, "../x"),
]


def edited_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits: bytes flipped, cut, doubled, moved, or a token of JSON put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 1, 2, 5, 20, 200)))
        kind = rng.randrange(7)
        if kind == 0 and at < end:
            found[at] = rng.choice((found[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
        elif kind == 1:
            del found[at:end]
        elif kind == 2:
            found[at:at] = found[at:end]
        elif kind == 3:
            piece = found[at:end]
            del found[at:end]
            to = rng.randrange(len(found) + 1)
            found[to:to] = piece
        elif kind == 4:
            del found[at:]
        else:
            found[at : end if kind == 5 else at] = rng.choice(TOKENS)
    return bytes(found)


def edited_value(rng: random.Random, document: object) -> object:
    """A JSON document with one to four of its values, at any depth, others, gone or doubled."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = []
        todo = [document]
        while todo:
            level = todo.pop()
            keys = list(level) if isinstance(level, dict) else range(len(level))
            places += [(level, key) for key in keys]
            todo += [level[key] for key in keys if isinstance(level[key], dict | list)]
        if not places:
            break
        level, key = rng.choice(places)
        other_level, other_key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del level[key]
        elif kind == 1:
            level[key] = json.loads(json.dumps(other_level[other_key]))
        elif kind == 2 and isinstance(level, dict):
            level[rng.choice(["a", "", "\x1b", str(other_key), "num_local_experts"])] = level[key]
        elif kind == 3 and isinstance(level[key], int) and level[key] < 2**64:
            level[key] += rng.choice((-1, 1, 2, 64, 2**31, 2**63))
        else:
            level[key] = deepcopy(rng.choice(VALUES))
    return document


def tries(count: int, name: str):
    """Seeds of so many tries, others for each mutator."""
    for n in range(count * TIMES):
        yield random.Random(f"{name} {SEED} {n}")


def small(check: Callable[[], bool], data: bytes) -> bool:
    """What a check returns, if it used little memory."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    result = check()
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < LARGEST_PEAK, (peak, data)
    return result


class File:
    """A file in memory behind a link: thousands of writes cost a disk more than the tests do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.memfd_create("fuzz")
        path.unlink(missing_ok=True)
        path.symlink_to(f"/proc/self/fd/{self._fd}")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)


@pytest.fixture(autouse=True)
def _traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


HEADER, END = header_of(names_in(S2))
HEADER |= {
    "__metadata__": {"format": "pt"},
    "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [END, END]},
    "one": {"dtype": "F64", "shape": [], "data_offsets": [END, END + 8]},
    "half": {"dtype": "F4", "shape": [4], "data_offsets": [END + 8, END + 10]},
}
DATA = weights(END) + bytes(10)


def check_refusal(error: InputError, start: str, data: bytes) -> None:
    """Lines that name the file, and can be printed."""
    problems = error.problems
    good = [p.isprintable() and p.startswith(start) and 10 < len(p) <= 1000 for p in problems]
    if not good or not all(good):
        raise AssertionError((problems, data))


def check_header(file: File, data: bytes) -> bool:
    """Ours accepts only what the library accepts, and reads the same; whether it accepts."""
    file.write(data)
    try:
        shard, infos = read_header(file.path)
    except CheckpointError as error:
        check_refusal(error, "x.safetensors: ", data)
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} from {data!r}") from error
    try:
        theirs = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"the library refuses {data!r}: {error}") from error
    assert shard.nbytes == len(data)
    assert {info.name for info in infos} == theirs.keys(), data
    for info in infos:
        found = theirs[info.name]
        assert data[info.offset : info.offset + info.nbytes] == bytes(found["data"]), data
        assert info.dtype == found["dtype"], data
        if info.dtype != "F4":  # the library counts bytes of these
            assert list(info.shape) == list(found["shape"]), data
    return True


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bytes", "values", "text"])
def test_headers(tmp_path, way):
    text = json.dumps(HEADER).encode()
    accepted = 0
    with File(tmp_path / "x.safetensors") as file:
        for rng in tries(3000, f"header {way}"):
            if way == "bytes":
                data = edited_bytes(rng, packed(text, DATA))
            elif way == "values":
                data = packed(json.dumps(edited_value(rng, HEADER)).encode(), DATA)
            else:  # the length is that of the text, so that what comes after it is looked at
                data = packed(edited_bytes(rng, text), DATA)
            accepted += small(partial(check_header, file, data), data)
    assert accepted  # else nothing is compared


def test_a_good_header_is_accepted(tmp_path):
    with File(tmp_path / "x.safetensors") as file:
        assert check_header(file, packed(json.dumps(HEADER).encode() + b"  ", DATA))


def check_plan(folder: Path, file: File, data: bytes) -> bool:
    """A plan, or a refusal in lines that can be printed; whether there is a plan."""
    file.write(data)
    try:
        plan = moe_ckpt.make_plan(folder / "in", stats=[folder / "stats.json"])
    except InputError as error:
        check_refusal(error, "", data)
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} from {data[:5000]!r}") from error
    assert {found.num_experts for found in plan.experts} == {4}, data
    amax = [job.input_amax for shard in plan.shards for job in shard.jobs]
    assert all(0 < value < 3.5e38 for value in amax if value is not None), data
    return True


DOCUMENTS: dict[str, tuple[str, object, int]] = {
    "index": (f"in/{INDEX}", {"metadata": {"total_size": 99}, "weight_map": SHARD_OF}, 250),
    "config": (
        "in/config.json",
        CONFIG
        | {
            "text_config": CONFIG | {"rope": {"theta": [1.5, None]}},
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "symmetric": True},
                        "input_activations": None,
                        "targets": ["Linear"],
                    }
                },
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
                "ignore": ["lm_head"],
            },
        },
        250,
    ),
    "hf_quant_config": (
        "in/hf_quant_config.json",
        {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": "FP8",
                "group_size": 16,
                "exclude_modules": ["lm_head"],
                "quantized_layers": {"a": {"quant_algo": "FP8"}},
            },
        },
        150,
    ),
    "stats": (
        "stats.json",
        {
            "schema": "moe-ckpt/stats",
            "version": 1,
            "num_tokens": 7,
            "modules": {
                "model.layers.0.mlp.experts.gate_up_proj": {"input_amax": [1, 2.5, None, 0]},
                "model.layers.0.mlp.experts.down_proj": {"input_amax": 3.5, "num_tokens": 7},
                "model.layers.0.mlp.experts.1.down_proj": {"input_amax": 0.1, "output_amax": 4},
            },
        },
        250,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bytes", "values"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(tmp_path, name, way):
    make(tmp_path)
    changed, document, count = DOCUMENTS[name]
    text = json.dumps(document).encode()
    accepted = 0
    with File(tmp_path / changed) as file:
        assert check_plan(tmp_path, file, text)
        for rng in tries(count, f"{name} {way}"):
            if way == "bytes":
                data = edited_bytes(rng, text)
            else:
                data = json.dumps(edited_value(rng, document)).encode()
            accepted += small(partial(check_plan, tmp_path, file, data), data)
    assert accepted


@pytest.mark.slow
def test_statistics_by_themselves(tmp_path):
    """Faster than with a plan; what is read is finite and above 0."""
    document = DOCUMENTS["stats"][1]
    with File(tmp_path / "stats.json") as file:
        for rng in tries(3000, "statistics"):
            if rng.random() < 0.5:
                data = edited_bytes(rng, json.dumps(document).encode())
            else:
                data = json.dumps(edited_value(rng, document)).encode()
            file.write(data)
            try:
                found = read_stats([file.path])
            except InputError as error:
                check_refusal(error, "stats.json: ", data)
                continue
            for amax in found.input_amax.values():
                entries = amax if isinstance(amax, tuple) else (amax,)
                assert all(entry is None or 0 < entry < 3.5e38 for entry in entries), data
