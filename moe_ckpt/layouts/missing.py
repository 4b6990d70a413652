"""What a model should have, by its config.json and its sister layers, and its checkpoint lacks.

Names alone decide. Of a quantized weight one tensor is enough: that all of its parts are there is
for others to say, and so it is of the experts of a layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from ..errors import show, show_some
from ..words import count_of
from .family import Family
from .roles import is_multi_token, set_aside
from .sisters import Layer, has_mixer, incomplete, missing_of_mtp, missing_parts
from .sizes import announced_mtp, levels_of, num_hidden_layers, num_stacked_layers

__all__ = ["HEAD", "LAYERS", "MTP", "OUTSIDE", "PART", "PARTIAL", "Lack", "stacks_of"]
__all__ += ["what_is_missing"]

# What is missing: whole layers; a part of a layer; the embedding, the last norm or all attention;
# the head; layers for multi-token prediction; all but the layers.
LAYERS, PART, OUTSIDE, HEAD, MTP, PARTIAL = "layers", "part", "outside", "head", "mtp", "partial"

_LAYERS_CAP = 10_000  # a config.json may say any number
_NUMBERED = re.compile(r"(.+?)\.([0-9]{1,9})\.(.+)")
_EXPERTS = re.compile(r"(?:^|\.)(?:local_)?experts(?=\.|$)")
# Endings of what belongs to one weight, whoever quantized it.
_OF_WEIGHT = re.compile(
    r"\.(weight_(packed|shape|zero_point|g_idx|global_scale|scale\w*)|qweight|qzeros|scales|g_idx"
    r"|scale|(input|output|activation|pre_quant)\w*_scale\w*)$"
)
_KV_SCALE = re.compile(r"\.[kvq]_scale$|\.(attn|kv_cache)\.\w*scale\w*$")

_NORM = re.compile(r"norm|\bln_")
_LAST_NORM = re.compile(r"(?!embed_norm)\w*norm(_f)?|ln_f")
_EMBEDDING = re.compile(r"(^|\.)(?!unembed)(\w*embed(_tokens|ding|dings|_in|s)?|wte)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|head|output_layer|output|unembed|embed_out|score|classifier)\.")
_WITH_HEAD = re.compile(r"CausalLM|ConditionalGeneration|LMHead")


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that is missing: where, and why it should be there.

    ``kind`` is one of those above. ``may_be_meant``: whether people leave it out on purpose.
    """

    where: str
    problem: str
    kind: str
    may_be_meant: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def what_is_missing(
    names: Iterable[str],
    config: Mapping[str, Any],
    family: Family | None,
    stacks: Set[str] = frozenset(),
) -> list[Lack]:
    """What the checkpoint with these tensors lacks.

    ``family``: the row of its model type; None if it has none, so that less is known. ``stacks``:
    the paths that hold the layers with experts; found by that word if not given.

    Raises:
        LayoutError: config.json says something that is no number of layers.
    """
    num_layers = num_hidden_layers(config)
    merged = _merged(names)
    stacks = stacks or _stacks_in(merged)
    layers: dict[str, dict[int, Layer]] = {stack: defaultdict(list) for stack in stacks}
    beyond: dict[tuple[str, int], Layer] = defaultdict(list)
    outside: list[str] = []
    has_mtp = False
    for name in merged:
        match = _NUMBERED.match(name)
        if match and match[1] in stacks:
            number = int(match[2])
            if num_layers is not None and number >= num_layers:
                beyond[match[1], number].append(match[3])
            else:
                layers[match[1]][number].append(match[3])
        elif is_multi_token(name):
            has_mtp = True
        elif not match and set_aside(name, frozenset(), None) is None:
            outside.append(name)
    lacks: list[Lack] = []
    expected = num_stacked_layers(config)
    uneven = family.uneven if family else ()
    for stack, of_stack in layers.items():
        lacks += _missing_layers(stack, of_stack.keys(), expected)
        lacks += _missing_of_layers(stack, of_stack, config, uneven)
    if family:
        lacks += _missing_outside(outside, config, layers)
    numbers = {number for _, number in beyond}
    lacks = [*_meant(lacks), *_missing_mtp(config, has_mtp, numbers, num_layers)]
    return [*lacks, *_missing_in_mtp(config, beyond, layers, num_layers)]


def stacks_of(names: Iterable[str]) -> frozenset[str]:
    """The paths that hold layers with experts, found by that word."""
    return _stacks_in(_merged(names))


def _meant(lacks: list[Lack]) -> Iterator[Lack]:
    """The same; of what is not a whole model, all that is missing may be left out on purpose.

    That is one without embedding, last norm or attention. Of layers alone, the parts that are
    missing in them are not named.
    """
    kinds = {lack.kind for lack in lacks}
    is_slice = OUTSIDE in kinds or PARTIAL in kinds
    for lack in lacks:
        if PARTIAL not in kinds or lack.kind != PART:
            yield replace(lack, may_be_meant=lack.may_be_meant or is_slice)


def _merged(names: Iterable[str]) -> dict[str, None]:
    """Names with the experts of a layer as one, and all tensors of a weight as one."""
    merged: dict[str, None] = {}
    for name in names:
        head, of_experts, _ = name.partition(".experts.")
        if of_experts:
            merged[f"{head}.experts"] = None
        elif not _KV_SCALE.search(name):
            match = _EXPERTS.search(name)
            merged[name[: match.end()] if match else _OF_WEIGHT.sub(".weight", name)] = None
    return merged


def _stacks_in(merged: Iterable[str]) -> frozenset[str]:
    """The paths of layers with experts."""
    found = (_NUMBERED.match(name) for name in merged if _EXPERTS.search(name))
    return frozenset(
        match[1] for match in found if match and set_aside(match[0], frozenset(), None) is None
    )


def _missing_layers(stack: str, there: Collection[int], num_layers: int | None) -> Iterator[Lack]:
    """Layers of which nothing is there; the first or the last may be left out on purpose."""
    if not there or num_layers is None:
        return
    first, last = min(there), max(there)
    inner = [n for n in range(first, min(last, first + _LAYERS_CAP)) if n not in there]
    outer = [n for n in range(min(num_layers, _LAYERS_CAP)) if not first <= n <= last]
    for gone, may_be_meant in ((inner, False), (outer, True)):
        if gone:
            problem = (
                f"{len(gone)} of {num_layers} layers are not in the checkpoint: {show_some(gone)}"
            )
            yield Lack(show(stack), problem, LAYERS, may_be_meant)


def _missing_of_layers(
    stack: str, layers: Mapping[int, Layer], config: Mapping[str, Any], uneven: Iterable[str]
) -> Iterator[Lack]:
    """Parts of layers, each once."""
    problems: dict[tuple[int, str], str] = {}
    for number, part, count in missing_parts(layers, config, uneven):
        have = "other layer like it has" if count == 1 else "other layers like it have"
        problems[number, part] = f"is missing; {count} {have} it"
    for number, part, why in incomplete(layers):
        problems.setdefault((number, part), f"is missing; {why}")
    for (number, part), problem in sorted(problems.items()):
        yield Lack(show(f"{stack}.{number}.{part}"), problem, PART)


def _missing_outside(
    names: Iterable[str], config: Mapping[str, Any], layers: Mapping[str, Mapping[int, Layer]]
) -> Iterator[Lack]:
    """Embedding, last norm and head; attention too, if no layer has any."""
    weights = [name for name in names if not name.endswith(".bias")]
    has_embedding = any(_EMBEDDING.search(name) and not _NORM.search(name) for name in weights)
    roots = tuple(stack.rpartition(".")[0] for stack in layers)
    modules = [name.removesuffix(".weight") for name in weights if name.startswith(roots)]
    has_norm = any(_LAST_NORM.fullmatch(module.rpartition(".")[2]) for module in modules)
    mixes = not layers or any(has_mixer(layer) for of in layers.values() for layer in of.values())
    if not has_embedding and not (has_norm and mixes):
        problem = "is that of a whole model; only layers are there, or experts, and no embedding"
        yield Lack("config.json", problem, PARTIAL, True)
        return
    for is_there, what in (
        (has_embedding, "no embedding (embed_tokens) is there"),
        (has_norm or not roots, "no norm after the last layer is there"),
        (mixes, "no layer has attention"),
    ):
        if not is_there:
            yield Lack("config.json", f"is that of a whole model; {what}", OUTSIDE)
    if _is_untied(config) and not any(_HEAD.search(f"{name}.") for name in weights):
        yield Lack("lm_head", "is missing; config.json has tie_word_embeddings false", HEAD)


def _is_untied(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that there is a head, and that it is not the embedding."""
    said = [level.get("tie_word_embeddings") for _, level in levels_of(config)]
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else ""
    return False in said and True not in said and bool(_WITH_HEAD.search(str(first)))


def _missing_mtp(
    config: Mapping[str, Any], has_mtp: bool, beyond: Set[int], num_layers: int | None
) -> Iterator[Lack]:
    """Layers for multi-token prediction that config.json announces.

    Where they follow the ordinary layers, each is looked for; else one stands for all, since some
    models use one several times.
    """
    key, count = announced_mtp(config)
    gone: list[int] = []
    if beyond and num_layers is not None:
        wanted = range(num_layers, num_layers + min(count, _LAYERS_CAP))
        gone = [n for n in wanted if n not in beyond]
    if gone or (count and not beyond and not has_mtp):
        what = f"{count_of(count, 'layer')} for multi-token prediction (MTP)"
        missing = f"not there: {show_some(gone)}" if gone else "none is there"
        yield Lack(f"config.json: {key}", f"says {what}, {missing}", MTP, True)


def _missing_in_mtp(
    config: Mapping[str, Any],
    beyond: Mapping[tuple[str, int], Layer],
    layers: Mapping[str, Mapping[int, Layer]],
    num_layers: int | None,
) -> Iterator[Lack]:
    """Parts of the layers for multi-token prediction that config.json announces."""
    _, count = announced_mtp(config)
    for (stack, number), layer in sorted(beyond.items()):
        if layers[stack] and num_layers is not None and number < num_layers + count:
            for part, why in missing_of_mtp(layer, layers[stack].values()):
                yield Lack(show(f"{stack}.{number}.{part}"), f"is missing; {why}", MTP, True)
