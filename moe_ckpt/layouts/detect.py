"""Find the routed experts of a checkpoint from its headers and config, or say why not.

Nothing is guessed. The model type chooses a row of the table; the names must be that row's, the
container complete, and the shapes of gate_up and down must fit together, fit the row, and be
made of sizes that config.json names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import LayoutError, Problems, show, show_some
from ..headers import TensorInfo
from ..modules import module_of, reason_to_keep, set_aside
from .container import Container, Experts
from .family import SPLIT, Family, Form
from .given import Given, family_of_unknown, orders_of, with_layout
from .packed import name_of_packing
from .sizes import model_type_of, num_hidden_layers, sizes_of
from .table import FAMILIES, UNSUPPORTED, find_family

__all__ = ["Detection", "detect"]

_NOT_ROUTED = re.compile(
    r"(^|\.)(shared_?experts?|share_expert|shared_mlp|self_attn|self_attention)\w*\."
    r"|\.e_score_correction_bias$"  # laguna keeps it under experts
)
_EXPERT = re.compile(r"(^|\.)(local_)?experts?(\.|_\d)")
_MOE = re.compile(r"experts?|moe")
_LORA = re.compile(r"\.lora_\w+(\.|$)")
_MTP_ONLY = re.compile(r"(^|\.)(eh_proj|enorm|hnorm|shared_head|embed_tokens|\w*mtp\w*)(\.|$)")


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


def detect(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], given: Given | None = None
) -> Detection:
    """Detect the layout of the routed experts.

    ``given`` is what the user says where headers and table leave it open.

    Raises:
        UsageError: ``given`` has unknown words.
        LayoutError: with every problem found.
    """
    given = given or Given()
    given.check()
    problems = Problems()
    lora = [name for name in tensors if _LORA.search(name)]
    if lora:
        raise LayoutError(
            f"{show_some(lora)}: belong to a LoRA adapter; merge it into the model first"
        )
    family, orders = _family_of(tensors, config, given)
    sizes = sizes_of(config)
    for contradiction in sizes.contradictions:
        problems.add(LayoutError, contradiction)
    _refuse_unrestorable(family, tensors, problems)

    num_layers = num_hidden_layers(config)
    containers, unmatched = _group(family, tensors, num_layers)
    if unmatched:
        dtypes = {name: tensors[name].dtype for name in unmatched}
        packing = name_of_packing(dtypes)
        problems.add(
            LayoutError,
            f"{show_some(unmatched)}: looks like experts"
            f"{f' packed as {packing}' if packing else ''}, and family {family.name} stores them "
            f"as {_forms(family)}; it cannot be converted",
        )
    if not containers and not unmatched:
        problems.add(
            LayoutError,
            f"no routed experts found; family {family.name} stores them as {_forms(family)}",
        )
    experts: list[Experts] = []
    for container in containers:
        check = partial(container.check, tensors, family, sizes, orders)
        experts += problems.catch(check) or []
    _refuse_disagreement(experts, problems)
    layers = {group.layer for group in containers}
    stacks = frozenset(map(_stack_of, layers))
    routed = {(found.num_experts, found.hidden) for found in experts}
    warnings = _check_layers(tensors, layers, routed, num_layers, problems)
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


def _family_of(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], given: Given
) -> tuple[Family, dict[Form, str]]:
    """The row of the table, and how gate and up lie in each of its forms."""
    model_type = model_type_of(config)
    family = find_family(model_type)
    if family is not None:
        return with_layout(family, given), orders_of(family, config, given)
    if model_type in UNSUPPORTED:
        raise LayoutError(
            f"model type {show(model_type)} cannot be converted: {UNSUPPORTED[model_type]}"
        )
    if given.layout:
        family = family_of_unknown(model_type, tensors, given)
        return family, {form: form.order for form in family.forms}
    seen = [f"{name} {list(info.shape)}" for name, info in tensors.items() if _is_expert(info)]
    evidence = f"found {show_some(seen)}" if seen else "no tensor looks like experts either"
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise LayoutError(
        f"config.json: model_type {show(model_type)!r} is not in the table of families, and names "
        f"and shapes alone do not tell how experts are stored ({evidence}). If you know, say "
        f"--layout and --gate-up-order; `moe-ckpt layouts` explains them. Known: {known}"
    )


def _is_expert(info: TensorInfo) -> bool:
    """Whether a tensor looks like one of routed experts: by its path, or 3-D in a MoE block."""
    stacked = len(info.shape) == 3 and _MOE.search(info.name)
    return bool(stacked or _EXPERT.search(info.name)) and not _NOT_ROUTED.search(info.name)


def _forms(family: Family) -> str:
    split = f"{family.split}.E.{{{', '.join(family.projections)}}}.weight"
    return " or ".join([split, *(form.describe() for form in family.forms)])


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


def _group(
    family: Family, tensors: Mapping[str, TensorInfo], num_layers: int | None
) -> tuple[list[Container], list[str]]:
    """Containers by layer, and names that look like experts but are not the family's."""
    names = dict.fromkeys((form.path, form.leaves) for form in family.forms)
    matchers = [
        _matcher([_split_form(family)], expert=True),
        *(_matcher([f for f in family.forms if (f.path, f.leaves) == these]) for these in names),
    ]
    containers: dict[tuple[str, str], Container] = {}
    unmatched: list[str] = []
    for name, info in tensors.items():
        for pattern, forms in matchers:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            form, layer, source = forms[0], match[1], f"{match[1]}.{match[2]}"
            key = (source, form.layout)
            group = containers.setdefault(key, Container(layer, source, forms))
            if match["leaf"] in form.leaves:
                expert = int(match[3] or -1)
                group.members[expert, form.leaves.index(match["leaf"])] = name
            else:
                group.biases[form.biases.index(match["leaf"])] = name
            break
        else:
            if _is_expert(info):
                unmatched.append(name)
    stacks = {_stack_of(group.layer) for group in containers.values()}

    def routed(name: str) -> bool:
        return set_aside(name, stacks, num_layers) is None

    return (
        [group for group in containers.values() if routed(f"{group.source}.")],
        [name for name in unmatched if routed(name)],
    )


def _split_form(family: Family) -> Form:
    leaves = tuple(f"{projection}.weight" for projection in family.projections)
    return Form(SPLIT, family.split, leaves)


def _matcher(forms: list[Form], *, expert: bool = False) -> tuple[re.Pattern[str], list[Form]]:
    """A pattern for the names of forms that have the same names, and the forms."""
    form = forms[0]
    number = r"\.([0-9]{1,6})" if expert else "()"
    leaves = "|".join(map(re.escape, (*form.leaves, *form.biases)))
    path = re.escape(form.path)
    return re.compile(rf"(.+\.[0-9]+)\.({path}){number}\.(?P<leaf>{leaves})"), forms


def _stack_of(layer: str) -> str:
    """``model.layers`` of ``model.layers.3``."""
    return layer.rpartition(".")[0]


def _refuse_disagreement(experts: list[Experts], problems: Problems) -> None:
    """All layers of one stack must have the same sizes, and each layer its experts once."""
    layers: dict[str, list[Experts]] = defaultdict(list)
    for found in experts:
        layers[found.layer].append(found)
    first_of: dict[str, tuple[str, list[tuple[int, int, int]]]] = {}
    reported = set()
    for layer, groups in layers.items():
        if len({found.layout for found in groups}) > 1 or len({g.source for g in groups}) > 1:
            problems.add(LayoutError, f"{show(layer)}: has its experts twice, fused and split")
            continue
        stack = _stack_of(layer)
        sizes = [(found.num_experts, found.intermediate, found.hidden) for found in groups]
        source, expected = first_of.setdefault(stack, (groups[0].source, sizes))
        if sizes != expected and stack not in reported:
            reported.add(stack)
            problems.add(
                LayoutError,
                f"{show(groups[0].source)}: (E, I, H) is {_sizes(sizes)}, {show(source)} has "
                f"{_sizes(expected)}",
            )


def _sizes(sizes: list[tuple[int, int, int]]) -> str:
    return " and ".join(map(str, sizes))


def _check_layers(
    tensors: Mapping[str, TensorInfo],
    with_experts: Set[str],
    routers: Set[tuple[int, int]],
    num_layers: int | None,
    problems: Problems,
) -> tuple[str, ...]:
    """Layers that config.json and the tensors do not agree on.

    Refused are a layer with a router (of shape [E, H]) and no experts, and ordinary layers beyond
    the last one of config.json. Missing layers are a warning: families count them in different
    ways.
    """
    stacks = set(map(_stack_of, with_experts))
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
            and info.shape in routers
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
    """New names of tensors that transformers renames, where their old ones are known."""
    stacks = {_stack_of(found.layer) for found in experts if found.layout != SPLIT}
    consumed = {name for found in experts for name in found.tensors}
    renamed: dict[str, str] = {}
    for name in tensors:
        if name in consumed:
            continue
        new = family.loader_name(_restore_sibling(family, name, stacks))
        if new != name:
            renamed[name] = new
    return renamed


def _restore_sibling(family: Family, name: str, stacks: Set[str]) -> str:
    """The name of a tensor in a layer of a stack with fused experts."""
    match = re.match(r"((.+?)\.[0-9]+)\.", name) if family.renames else None
    if match is None or match[2] not in stacks:
        return name
    rest = name[match.end() :]
    for old, new in family.renames:
        if rest.startswith(old):
            return f"{match[1]}.{new}{rest.removeprefix(old)}"
    return name
