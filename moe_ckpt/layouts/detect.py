"""Find the routed experts of a checkpoint from its headers and config, or say why not.

Nothing is guessed. The model type chooses a row of the table; the names must be that row's, the
container complete, and the shapes of gate_up and down must fit together, fit the row, and be
made of sizes that config.json names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from ..checkpoint import TensorInfo
from ..dtypes import FLOATS
from ..errors import LayoutError, Problems, show, show_some
from ..modules import module_of, reason_to_keep, set_aside
from .sizes import Sizes, model_type_of, num_hidden_layers, sizes_of
from .table import FAMILIES, UNSUPPORTED, Family, find_family

__all__ = ["Detection", "Experts", "Rows", "detect"]

_NOT_ROUTED = re.compile(
    r"(^|\.)(shared_?experts?|share_expert|shared_mlp|self_attn|self_attention)\w*\."
    r"|\.e_score_correction_bias$"  # laguna keeps it under experts
)
_EXPERT = re.compile(r"(^|\.)(local_)?experts?(\.|_\d)")
_MOE = re.compile(r"experts?|moe")
_MTP_ONLY = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens|\w*mtp\w*)(\.|$)")


@dataclass(frozen=True, slots=True)
class Rows:
    """Contiguous rows of a tensor seen as a matrix [-1, K]."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer.

    ``gate_up`` and ``down`` hold the tensors: one each if fused, else 2E (gate, up of expert 0,
    then 1, ...) and E.
    """

    layer: str
    source: str
    output: str
    projections: tuple[str, str, str]
    form: str
    gate_up: tuple[str, ...]
    down: tuple[str, ...]
    num_experts: int
    hidden: int
    intermediate: int
    evidence: str

    def gate_up_rows(self, expert: int) -> tuple[Rows, ...]:
        """The rows [2I, H] of gate, then up, of one expert."""
        rows = self.intermediate
        if self.form == "fused":
            return (Rows(self.gate_up[0], expert * 2 * rows, 2 * rows),)
        return tuple(Rows(name, 0, rows) for name in self.gate_up[2 * expert : 2 * expert + 2])

    def down_rows(self, expert: int) -> tuple[Rows, ...]:
        """The rows [H, I] of down of one expert."""
        if self.form == "fused":
            return (Rows(self.down[0], expert * self.hidden, self.hidden),)
        return (Rows(self.down[expert], 0, self.hidden),)


@dataclass(frozen=True, slots=True)
class Detection:
    """The experts that were found, and what else follows from the family.

    ``renamed``: source tensor name -> output name, for siblings that transformers renamed.
    ``stacks``: the paths that hold the layers, such as ``model.layers``.
    ``num_layers``: how many layers a stack has before those for multi-token prediction.
    """

    family: Family
    model_type: str
    experts: tuple[Experts, ...]
    renamed: Mapping[str, str]
    stacks: frozenset[str]
    num_layers: int | None
    warnings: tuple[str, ...]


def detect(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Detection:
    """Detect the layout of the routed experts.

    Raises:
        LayoutError: with every problem found.
    """
    family = _family_of(tensors, config)
    problems = Problems()
    sizes = sizes_of(config)
    for contradiction in sizes.contradictions:
        problems.add(LayoutError, contradiction)
    _refuse_unrestorable(family, tensors, problems)

    num_layers = num_hidden_layers(config)
    containers, unmatched = _group(family, tensors, num_layers)
    if unmatched:
        problems.add(
            LayoutError,
            f"{show_some(unmatched)}: looks like experts, and family {family.name} stores them as "
            f"{_forms(family)}; it cannot be converted",
        )
    if not containers and not unmatched:
        problems.add(
            LayoutError,
            f"no routed experts found; family {family.name} stores them as {_forms(family)}",
        )
    experts: list[Experts] = []
    for container in containers:
        try:
            experts.append(container.check(tensors, family, sizes))
        except LayoutError as error:
            problems.absorb(error)
    _refuse_disagreement(experts, problems)
    stacks = frozenset(_stack_of(group.layer) for group in containers)
    warnings = _check_layers(tensors, experts, stacks, num_layers, problems)
    problems.check()
    return Detection(
        family=family,
        model_type=model_type_of(config),
        experts=tuple(experts),
        renamed=_restore_names(family, experts, tensors),
        stacks=stacks,
        num_layers=num_layers,
        warnings=warnings,
    )


def _family_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Family:
    model_type = model_type_of(config)
    family = find_family(model_type)
    if family is not None:
        return family
    if model_type in UNSUPPORTED:
        raise LayoutError(
            f"model type {show(model_type)}: this version does not convert its experts "
            f"({UNSUPPORTED[model_type]})"
        )
    seen = [f"{name} {list(info.shape)}" for name, info in tensors.items() if _is_expert(info)]
    evidence = f"found {show_some(seen)}" if seen else "no tensor looks like experts either"
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise LayoutError(
        f"config.json: model_type {show(model_type)!r} is not in the table of families, and names "
        f"and shapes alone do not tell how experts are stored ({evidence}). Known: {known}"
    )


def _is_expert(info: TensorInfo) -> bool:
    """Whether a tensor looks like one of routed experts: by its path, or 3-D in a MoE block."""
    stacked = len(info.shape) == 3 and _MOE.search(info.name)
    return bool(stacked or _EXPERT.search(info.name)) and not _NOT_ROUTED.search(info.name)


def _forms(family: Family) -> str:
    split = f"{family.split}.E.{'/'.join(family.projections)}.weight"
    return " or ".join([split, *(f"{p}.{a} + {p}.{b}" for p, a, b in family.fused)])


def _refuse_unrestorable(
    family: Family, tensors: Mapping[str, TensorInfo], problems: Problems
) -> None:
    found = [name for name in tensors if any(part in name for part in family.not_restorable)]
    if found:
        problems.add(
            LayoutError,
            f"{show_some(found)}: transformers renamed these when it saved the model, and loaders "
            f"of {family.name} do not read the new names; save it again with "
            "save_original_format=True",
        )


class _Container:
    """Tensors that may be the experts of one layer, before they are checked."""

    def __init__(self, layer: str, source: str, form: str) -> None:
        self.layer, self.source, self.form = layer, source, form
        self.members: dict[tuple[int, int], str] = {}  # (expert or -1, position) -> tensor

    def check(self, tensors: Mapping[str, TensorInfo], family: Family, sizes: Sizes) -> Experts:
        members = self.members
        gate_up: tuple[str, ...]
        down: tuple[str, ...]
        dtypes = {tensors[name].dtype for name in members.values()}
        if not dtypes <= FLOATS or len(dtypes) > 1:
            raise LayoutError(
                f"{show(self.source)}: experts are stored as {', '.join(sorted(dtypes))}; expected "
                "BF16, F16 or F32 throughout. Quantized or packed experts are not supported"
            )
        if self.form == "fused":
            E, H, I, shapes = self._fused_sizes(tensors, family)
            gate_up, down = (members[-1, 0],), (members[-1, 1],)
        else:
            E, H, I, shapes = self._split_sizes(tensors)
            gate_up = tuple(members[e, p] for e in range(E) for p in (0, 1))
            down = tuple(members[e, 2] for e in range(E))
        for what, value, known in (
            ("experts", E, sizes.experts),
            ("rows of gate (I)", I, sizes.intermediate),
            ("columns of gate (H)", H, sizes.hidden),
        ):
            if value not in known:
                listed = ", ".join(f"{key}={number}" for number, key in known.items()) or "nothing"
                raise LayoutError(
                    f"{show(self.source)}: {shapes} has {value} {what}, config.json says {listed}"
                )
        evidence = (
            f"{shapes}; E={E} ({sizes.experts[E]}), I={I} ({sizes.intermediate[I]}), "
            f"H={H} ({sizes.hidden[H]})"
        )
        return Experts(
            layer=self.layer,
            source=self.source,
            output=f"{self.layer}.{family.split}",
            projections=family.projections,
            form=self.form,
            gate_up=gate_up,
            down=down,
            num_experts=E,
            hidden=H,
            intermediate=I,
            evidence=evidence,
        )

    def _fused_sizes(
        self, tensors: Mapping[str, TensorInfo], family: Family
    ) -> tuple[int, int, int, str]:
        if len(self.members) != 2:
            raise LayoutError(
                f"{show(self.source)}: only {show_some(self.members.values())} is there; fused "
                "experts need gate_up and down"
            )
        first, second = (tensors[self.members[-1, p]] for p in (0, 1))
        shapes = (
            f"{show(first.name)} {list(first.shape)} with {show(second.name.split('.')[-1])} "
            f"{list(second.shape)}"
        )
        if len(first.shape) != 3 or len(second.shape) != 3 or 0 in first.shape + second.shape:
            raise LayoutError(f"{shapes}: expected two 3-D tensors, [E, 2I, H] and [E, H, I]")
        (E, a, b), (E2, c, d) = first.shape, second.shape
        if E != E2:
            raise LayoutError(f"{shapes}: the numbers of experts differ, {E} and {E2}")
        if a != 2 * d or b != c:
            transposed = b == 2 * c and a == d
            stored = "stored transposed, [E, H, 2I] and [E, I, H]" if transposed else "neither"
            raise LayoutError(
                f"{shapes}: expected [E, 2I, H] and [E, H, I]; these are {stored}, which this "
                "version does not convert"
            )
        if family.either_orientation and (a == b or c == d):
            raise LayoutError(
                f"{shapes}: one of them is square, and {family.name} files exist in both "
                "orientations; the shapes cannot tell which this is"
            )
        return E, b, d, shapes

    def _split_sizes(self, tensors: Mapping[str, TensorInfo]) -> tuple[int, int, int, str]:
        ids = {expert for expert, _ in self.members}
        E = max(ids) + 1
        missing = E * 3 - len(self.members)
        if missing:
            e, p = next((e, p) for e in range(E) for p in range(3) if (e, p) not in self.members)
            raise LayoutError(
                f"{show(self.source)}: {missing} of {E * 3} expert matrices are missing, first "
                f"{('gate', 'up', 'down')[p]} of expert {e}"
            )
        gate, up, down = (tensors[self.members[0, p]].shape for p in range(3))
        shapes = f"{show(self.source)}.0 {list(gate)}, {list(up)}, {list(down)}"
        if len(gate) != 2 or gate != up or down != gate[::-1] or 0 in gate:
            raise LayoutError(f"{shapes}: expected gate [I, H], up [I, H] and down [H, I]")
        for (_, p), name in self.members.items():
            if tensors[name].shape != (gate, up, down)[p]:
                raise LayoutError(
                    f"{show(name)}: is {list(tensors[name].shape)}, expert 0 has "
                    f"{list((gate, up, down)[p])}"
                )
        return E, gate[1], gate[0], shapes


def _group(
    family: Family, tensors: Mapping[str, TensorInfo], num_layers: int | None
) -> tuple[list[_Container], list[str]]:
    """Containers by layer, and names that look like experts but are not the family's."""
    leaves = "|".join(family.projections)
    split = re.compile(
        rf"(.+\.[0-9]+)\.({re.escape(family.split)})\.([0-9]{{1,6}})\.({leaves})\.weight"
    )
    fused = [
        (re.compile(rf"(.+\.[0-9]+)\.({re.escape(path)})\.({re.escape(a)}|{re.escape(b)})"), a)
        for path, a, b in family.fused
    ]
    containers: dict[tuple[str, str], _Container] = {}
    unmatched: list[str] = []
    for name, info in tensors.items():
        matches = [(m, first) for pattern, first in fused if (m := pattern.fullmatch(name))]
        one = split.fullmatch(name)
        if matches:
            match, first = matches[0]
            source = f"{match[1]}.{match[2]}"
            group = containers.setdefault((source, "fused"), _Container(match[1], source, "fused"))
            group.members[-1, 0 if match[3] == first else 1] = name
        elif one:
            source = f"{one[1]}.{one[2]}"
            group = containers.setdefault((source, "split"), _Container(one[1], source, "split"))
            group.members[int(one[3]), family.projections.index(one[4])] = name
        elif _is_expert(info):
            unmatched.append(name)
    stacks = {_stack_of(group.layer) for group in containers.values()}

    def routed(name: str) -> bool:
        return set_aside(name, stacks, num_layers) is None

    return (
        [group for group in containers.values() if routed(f"{group.source}.")],
        [name for name in unmatched if routed(name)],
    )


def _stack_of(layer: str) -> str:
    """``model.layers`` of ``model.layers.3``."""
    return layer.rpartition(".")[0]


def _refuse_disagreement(experts: list[Experts], problems: Problems) -> None:
    """All layers of one stack must have the same sizes, and each layer its experts once."""
    for layer, count in Counter(found.layer for found in experts).items():
        if count > 1:
            problems.add(LayoutError, f"{show(layer)}: has its experts twice, fused and split")
    stacks: dict[str, list[Experts]] = defaultdict(list)
    for found in experts:
        stacks[_stack_of(found.layer)].append(found)
    for members in stacks.values():
        first = members[0]
        for other in members[1:]:
            one, two = (
                (found.num_experts, found.intermediate, found.hidden) for found in (first, other)
            )
            if one != two:
                problems.add(
                    LayoutError,
                    f"{show(other.source)}: (E, I, H) is {two}, {show(first.source)} has {one}",
                )
                break


def _check_layers(
    tensors: Mapping[str, TensorInfo],
    experts: list[Experts],
    stacks: Set[str],
    num_layers: int | None,
    problems: Problems,
) -> tuple[str, ...]:
    """Layers that config.json and the tensors do not agree on.

    Refused are a layer with a router and no experts, and ordinary layers beyond the last one of
    config.json. Missing layers are a warning: families count them in different ways.
    """
    with_experts = {found.layer: found for found in experts}
    routed = {(found.num_experts, found.hidden) for found in experts}
    present: dict[str, set[int]] = defaultdict(set)
    beyond: dict[str, bool] = {}
    for name, info in tensors.items():
        match = re.match(r"((.+?)\.([0-9]{1,9}))\.(.+)", name)
        if match is None or match[2] not in stacks:
            continue
        layer, number = match[1], int(match[3])
        present[match[2]].add(number)
        if num_layers is not None and number >= num_layers:
            beyond[layer] = beyond.get(layer, False) or bool(_MTP_ONLY.search(match[4]))
        elif (
            layer not in with_experts
            and info.shape in routed
            and reason_to_keep(module_of(name)) == "router"
        ):
            problems.add(
                LayoutError, f"{show(name)}: is a router, but {show(layer)} has no experts"
            )
    ordinary = [layer for layer, is_mtp in beyond.items() if not is_mtp]
    if ordinary:
        problems.add(
            LayoutError,
            f"{show_some(ordinary)}: config.json says num_hidden_layers={num_layers}, and these do "
            "not look like multi-token prediction (eh_proj, enorm, hnorm)",
        )
    return tuple(
        f"{show(stack)}: {len(missing)} of {num_layers} layers are not in the checkpoint: "
        f"{show_some(missing)}"
        for stack, numbers in present.items()
        if (missing := [n for n in range(min(num_layers or 0, 10_000)) if n not in numbers])
    )


def _restore_names(
    family: Family, experts: list[Experts], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """New names of the tensors in stacks with fused experts, where transformers renames them."""
    stacks = {_stack_of(found.layer) for found in experts if found.form == "fused"}
    consumed = {name for found in experts for name in (*found.gate_up, *found.down)}
    renamed: dict[str, str] = {}
    if not family.renames or not stacks:
        return renamed
    for name in tensors:
        match = re.match(r"((.+?)\.[0-9]+)\.", name)
        if name in consumed or match is None or match[2] not in stacks:
            continue
        rest = name[match.end() :]
        for old, new in family.renames:
            if rest.startswith(old):
                renamed[name] = f"{match[1]}.{new}{rest.removeprefix(old)}"
                break
    return renamed
