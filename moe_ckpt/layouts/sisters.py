"""Layers of a model held against each other: what one lacks, and those like it have.

Which layers are alike follows from the lists of config.json that have an entry for each layer, or
name layers, so that no rule of a family is repeated here. What mixes tokens (attention, Mamba,
convolutions) is compared apart from the rest of a layer: hybrid models alternate in one of them and
not in the other. Norms are the same in all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from .sizes import levels_of

__all__ = ["Layer", "has_mixer", "incomplete", "missing_of_mtp", "missing_parts"]

# The names below a layer, as in self_attn.q_proj.weight.
Layer = list[str]
# What of one third a layer has, by first component of the name.
Blocks = Mapping[str, frozenset[str]]

# What mixes tokens, the norms around it, and the rest: MLP or experts, mostly.
_MIXES, _NORMS, _REST = "mixes", "norms", "rest"
_MIXER = re.compile(r"attn|attention|mixer|mamba|conv|ssm|linear|indexer|compressor")

# Keys of lists with an entry for each layer; those that speak of one third alone.
_PER_LAYER = re.compile(
    r"layer|type|pattern|freq|ratio|block|attn|moe|mlp|expert|swa|hybrid|index|heads|sparse"
)
_OF_REST = re.compile(r"mlp|moe|ffn|expert|dense")
_OF_MIXER = re.compile(
    r"layer_types|attn|attention|swa|sliding|window|hybrid|rope|index|compress|heads|linear|kda"
)
_NUMBERS_CAP = 10_000

# What modules compute for themselves, and some save.
_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias)$")
# Keys that let layers use what another computed, and the parts that they are then without.
_SHARED = (
    (re.compile(r"sink"), re.compile(r"sink")),
    (re.compile(r"num_kv_shared_layers|use_cla|cla_share"), re.compile(r"\.[kv]_(proj|norm)\.")),
    (re.compile(r"index\w*(freq|pattern|types|shar)|sparse_attention"), re.compile(r"index")),
)

# What no kind of layer is without, if any has it.
_EVERYWHERE = re.compile(r".*\.(([qkvo]_proj|out_proj|[qk]_norm)\.\w+|sinks)")
_TRIPLES: tuple[tuple[str, ...], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("linear_gate", "up_proj", "down_proj"),
    ("w1", "w2", "w3"),
)
# What makes the input of a layer for multi-token prediction, and its own head.
_MTP_PARTS = (
    (("eh_proj.", "enorm.", "hnorm."), ("eh_proj", "enorm", "hnorm")),
    (("shared_head.",), ("shared_head.norm",)),
)
_EXPERTS = re.compile(r"(^|\.)experts$")
_ROUTER = re.compile(r"(^|\.)(gate|wg|router\w*)(\.|$)")


def has_mixer(layer: Layer) -> bool:
    """Whether a layer has something that mixes tokens."""
    return any(_third_of(name) == _MIXES for name in layer)


def missing_parts(
    layers: Mapping[int, Layer], config: Mapping[str, Any], uneven: Iterable[str] = ()
) -> Iterator[tuple[int, str, int]]:
    """Parts that a layer lacks and at least as many others of its kind have.

    ``uneven``: parts of names that some layers have and others like them have not.

    Yields:
        The number of the layer, the part (``self_attn``, ``self_attn.q_proj.weight``), and how
        many layers have it.
    """
    if not layers:
        return
    exempt = [_BUFFERS, *(pattern for key, pattern in _SHARED if _has_key(config, key))]
    exempt += [re.compile(re.escape(part)) for part in uneven]
    lists = list(_lists(config, max(layers) + 1))
    for third in (_MIXES, _NORMS, _REST):
        blocks = {number: _blocks(layer, exempt, third) for number, layer in layers.items()}
        entries = [entry for key, entry in lists if _speaks_of(key, third)]
        kinds: dict[object, dict[int, Blocks]] = defaultdict(dict)
        for number in sorted(blocks):
            kinds[tuple([entry(number) for entry in entries])][number] = blocks[number]
        for alike in kinds.values():
            yield from _lacks(alike)
        alone = {number for alike in kinds.values() if len(alike) == 1 for number in alike}
        for number, part, count in _lacks(blocks) if len(kinds) > 1 and alone else ():
            if number in alone and _EVERYWHERE.fullmatch(part):
                yield number, part, count


def incomplete(layers: Mapping[int, Layer]) -> Iterator[tuple[int, str, str]]:
    """Parts without which a layer makes no sense, whatever the others have.

    Yields:
        The number of the layer, the part, and why it should be there.
    """
    mlps = {number: list(_mlps(layer)) for number, layer in layers.items()}
    whole = {triple for found in mlps.values() for _, triple, there in found if len(there) == 3}
    for number, layer in layers.items():
        for parent, triple, there in mlps[number]:
            if len(there) == 2 and triple in whole:
                (gone,) = set(triple) - there
                yield number, f"{parent}.{gone}.weight", f"{' and '.join(sorted(there))} are there"
        experts = next(filter(_EXPERTS.search, layer), "")
        weights = [name for name in layer if not name.endswith("bias")]
        if experts and not any(map(_ROUTER.search, weights)):
            yield number, f"{experts} (router)", "its experts are there"


def missing_of_mtp(layer: Layer, ordinary: Iterable[Layer]) -> Iterator[tuple[str, str]]:
    """Parts that a layer for multi-token prediction lacks, in a stack with ordinary layers.

    Its attention, norms and experts are those of the ordinary layer that it has most of; a block
    of another kind is not compared. It may use embedding and head of the model.

    Yields:
        The part, and why it should be there.
    """
    there = frozenset(layer)
    like = max((frozenset(other) for other in ordinary), key=lambda names: len(names & there))
    mine, others = (
        {**_blocks(sorted(names), [], _MIXES), **_blocks(sorted(names), [], _REST)}
        for names in (there, like)
    )
    for block, names in mine.items():
        if names < others.get(block, frozenset()):
            yield from ((name, "ordinary layers have it") for name in sorted(others[block] - names))
    if any(block in others and names <= others[block] for block, names in mine.items()):
        norms = (name for name in sorted(like - there) if _third_of(name) == _NORMS)
        yield from ((name, "ordinary layers have it") for name in norms)
    for first, needs in _MTP_PARTS:
        if any(name.startswith(first) for name in there):
            for part in needs:
                if f"{part}.weight" not in there:
                    yield f"{part}.weight", "others of its kind are there"


def _mlps(layer: Layer) -> Iterator[tuple[str, tuple[str, ...], set[str]]]:
    found: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    for name in layer:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for triple in _TRIPLES:
            if leaf in triple:
                found[parent, triple].add(leaf)
    for (parent, triple), there in found.items():
        yield parent, triple, there


def _third_of(name: str) -> str:
    block, _, below = name.partition(".")
    if "norm" in block and not below.startswith("attn."):  # dbrx: norm_attn_norm.attn
        return _NORMS
    return _MIXES if _MIXER.search(block) else _REST


def _blocks(layer: Layer, exempt: list[re.Pattern[str]], third: str) -> Blocks:
    found: dict[str, list[str]] = defaultdict(list)
    for name in layer:
        if _third_of(name) == third and not any(pattern.search(name) for pattern in exempt):
            found[name.partition(".")[0]].append(name)
    return {block: frozenset(names) for block, names in found.items()}


def _lacks(layers: Mapping[int, Blocks]) -> Iterator[tuple[int, str, int]]:
    """Of layers that are alike: blocks that some lack, then parts of a block."""
    yield from _fewer({number: frozenset(blocks) for number, blocks in layers.items()})
    for block in dict.fromkeys(block for blocks in layers.values() for block in blocks):
        yield from _fewer(
            {number: blocks[block] for number, blocks in layers.items() if block in blocks}
        )


def _fewer(of_layer: Mapping[int, frozenset[str]]) -> Iterator[tuple[int, str, int]]:
    """What layers lack of a set that as many others have."""
    layers: dict[frozenset[str], list[int]] = defaultdict(list)
    for number, found in of_layer.items():
        layers[found].append(number)
    for few, numbers in layers.items():
        fuller = [
            (len(others), len(many), sorted(many - few))
            for many, others in layers.items()
            if few < many and len(others) >= len(numbers)
        ]
        if fuller:
            count, _, gone = max(fuller)
            yield from ((number, name, count) for number in numbers for name in gone)


def _has_key(config: Mapping[str, Any], pattern: re.Pattern[str]) -> bool:
    levels = [level for _, level in levels_of(config)]
    return any(pattern.search(key) and value for level in levels for key, value in level.items())


def _speaks_of(key: str, third: str) -> bool:
    """Whether what a key says of layers concerns that third of them."""
    of_rest, of_mixer = _OF_REST.search(key), _OF_MIXER.search(key)
    if third == _MIXES:
        return not of_rest
    return third == _REST and bool(of_rest or not of_mixer)


def _lists(config: Mapping[str, Any], count: int) -> Iterator[tuple[str, Callable[[int], object]]]:
    """What config.json says of each layer: a key, and what it says of a layer by its number."""
    for _, level in levels_of(config):
        for key, value in level.items():
            if not _PER_LAYER.search(key):
                continue
            if isinstance(value, list) and "layer" in key and _are_numbers(value):
                yield key, _in_numbers(frozenset(value), count)
            elif _is_listed(key, value) and len(value) >= count:
                yield key, _in_entries([repr(entry) for entry in value])
            elif key == "layer_group_size" and type(value) is int and value > 1:
                yield "attention", _in_groups(value, count)


def _is_listed(key: str, value: Any) -> bool:
    """Whether a value has entries; nemotron_h has a letter for each layer."""
    return isinstance(value, list) or (isinstance(value, str) and "pattern" in key)


def _are_numbers(value: list[Any]) -> bool:
    """Whether these are numbers of layers, in order."""
    numbers = bool(value) and all(type(n) is int and 0 <= n < _NUMBERS_CAP for n in value)
    return numbers and all(a < b for a, b in pairwise(value))


def _in_numbers(numbers: frozenset[int], count: int) -> Callable[[int], object]:
    if 0 in numbers:
        return lambda n: n in numbers
    if count in numbers:
        return lambda n: n + 1 in numbers
    return lambda n: (n in numbers, n + 1 in numbers)  # some count from 1


def _in_entries(entries: list[str]) -> Callable[[int], object]:
    return lambda n: entries[n]


def _in_groups(size: int, count: int) -> Callable[[int], object]:
    """The last layer of each group has the other attention, and so have those in no whole group."""
    return lambda n: (n + 1) % size == 0 or n >= count // size * size
