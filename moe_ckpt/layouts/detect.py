"""Find the routed experts of a checkpoint from its headers and config, or say why not.

Nothing is guessed. The model type chooses a row of the table; the names must be that row's, the
container complete, and the shapes of gate_up and down must fit together, fit the row, and be
made of sizes that config.json names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..dtypes import FLOATS
from ..errors import LayoutError, Problems, show, show_some
from ..source.headers import TensorInfo
from ..source.packings import name_of_packing
from ..source.strict_json import show_value
from .container import Container
from .experts import Experts
from .family import Family, Form
from .given import Given, family_of_unknown, refuse_contradictions, with_layout, with_order
from .layers import check_layers, refuse_disagreement, stack_of
from .names import refuse_unrestorable, restore_names
from .roles import module_of, set_aside
from .sizes import Sizes, model_type_of, num_hidden_layers, sizes_of
from .table import UNSUPPORTED
from .wrappers import family_of_config

__all__ = ["Detection", "detect"]

_NOT_ROUTED = re.compile(
    r"(^|\.)(shared_?experts?|share_expert|shared_mlp|self_attn|self_attention)\w*\."
    r"|\.e_score_correction_bias$"  # laguna keeps it under experts
    r"|\.post_expert_norm\."  # so does muse_spark
)
_EXPERT = re.compile(r"(^|\.)(local_)?experts?(\.|_\d)")
_MOE = re.compile(r"experts?|moe|switch_mlp")


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

    def output_name(self, name: str) -> str:
        """The output name of a source tensor, or of a source module."""
        if name in self.renamed:
            return self.renamed[name]
        weight = self.renamed.get(f"{name}.weight")
        return module_of(weight) if weight else name


def detect(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], given: Given | None = None
) -> Detection:
    """Detect the layout of the routed experts.

    ``given`` is what the user says where headers and table leave it open.

    Raises:
        LayoutError: with every problem found.
    """
    given = given or Given()
    problems = Problems()
    family = _family_of(tensors, config, given)
    sizes = sizes_of(config)
    for contradiction in sizes.contradictions:
        problems.add(LayoutError, contradiction)
    refuse_unrestorable(family, tensors, problems)

    num_layers = num_hidden_layers(config)
    containers, unmatched = _group(family, tensors, sizes, num_layers)
    members = [name for container in containers for name in container.names]
    dtypes = {name: tensors[name].dtype for name in (*members, *unmatched)}
    is_packed = unmatched or not FLOATS.issuperset(dtypes.values())
    packing = name_of_packing(dtypes) if is_packed else ""
    if unmatched:
        problems.add(
            LayoutError,
            f"{show_some(unmatched)}: looks like experts"
            f"{f' packed as {packing}' if packing else ''}, and family {family.name} stores them "
            f"as {_forms(family)}; it cannot be converted"
            f"{_bias_of_unknown(unmatched, given)}",
        )
    if not containers and not unmatched:
        problems.add(
            LayoutError,
            f"no routed experts found; family {family.name} stores them as {_forms(family)}",
        )
    experts: list[Experts] = []
    of_layers: dict[str, list[Container]] = {}
    for container in containers:
        of_layers.setdefault(container.layer, []).append(container)
    for forms in of_layers.values():
        whole = [form for form in forms if len(forms) > 1 and _is_whole(form, packing)]
        if whole:
            problems.add(LayoutError, _two_forms(forms, whole[-1]))
        else:
            for form in forms:
                experts += problems.catch(partial(form.check, packing)) or []
    problems.catch(lambda: refuse_contradictions(experts, given))
    refuse_disagreement(experts, problems)
    layers = {group.layer for group in containers}
    stacks = frozenset(map(stack_of, layers))
    routed = {(found.num_experts, found.hidden) for found in experts}
    check_layers(tensors, layers, routed, num_layers, problems)
    problems.check()
    model_type = model_type_of(config)
    warnings: tuple[str, ...] = ()
    if not model_type and family.model_types[0]:
        model_type = family.model_types[0]
        warnings = (
            f"config.json names no model_type, which runtimes ask for: that of its text model, "
            f"{show(model_type)}, tells how experts are stored",
        )
    return Detection(
        family=family,
        model_type=model_type,
        experts=tuple(experts),
        renamed=restore_names(family, experts, tensors),
        stacks=stacks,
        num_layers=num_layers,
        warnings=warnings,
    )


def _two_forms(forms: list[Container], whole: Container) -> str:
    """What to say of experts of one layer in several forms, one of which is whole."""
    others = show_some(name for form in forms if form is not whole for name in form.names)
    return (
        f"{show(whole.layer)}: has its experts in two forms: {others}, and "
        f"{show_some(whole.names)}; which of them count cannot be told. Remove those that are stale"
    )


def _is_whole(form: Container, packing: str) -> bool:
    try:
        return bool(form.check(packing))
    except LayoutError:
        return False


def _family_of(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], given: Given
) -> Family:
    """The row of the table, with what config and user say of it."""
    model_type = model_type_of(config)
    family = family_of_config(config)
    if family is not None:
        return with_order(with_layout(family, given), config, given)
    if model_type in UNSUPPORTED:
        raise LayoutError(
            f"model type {show(model_type)} cannot be converted: {UNSUPPORTED[model_type]}"
        )
    if given.layout:
        return family_of_unknown(model_type, tensors, given)
    seen = [f"{name} {list(info.shape)}" for name, info in tensors.items() if _is_expert(info)]
    evidence = f"found {show_some(seen)}" if seen else "no tensor looks like experts either"
    raise LayoutError(
        f"config.json: model_type {show_value(config.get('model_type'))} is not in the table of "
        f"families, and names and shapes alone do not tell how experts are stored ({evidence}). If "
        "you know, say --layout and --gate-up-order; `moe-ckpt layouts` explains them and lists "
        "the model types"
    )


def _is_expert(info: TensorInfo) -> bool:
    """Whether a tensor looks like one of routed experts: by its path, or 3-D in a MoE block."""
    stacked = len(info.shape) == 3 and _MOE.search(info.name)
    return bool(stacked or _EXPERT.search(info.name)) and not _NOT_ROUTED.search(info.name)


def _is_stack(info: TensorInfo, sizes: Sizes) -> bool:
    """Whether a tensor has the shape of experts, whatever its name."""
    if len(info.shape) != 3 or info.shape[0] not in sizes.experts:
        return False
    I = {*sizes.intermediate, *(2 * size for size in sizes.intermediate)}
    a, b = info.shape[1:]
    fits = (a in I and b in sizes.hidden) or (a in sizes.hidden and b in I)
    return fits and not _NOT_ROUTED.search(info.name)


def _forms(family: Family) -> str:
    forms = [form.describe() for form in family.forms]
    return " or ".join([family.describe_split(), *forms] if family.reads_split else forms)


def _bias_of_unknown(names: list[str], given: Given) -> str:
    if given.layout and any(name.endswith("bias") for name in names):
        return ". Biases of experts are known only for families in the table"
    return ""


def _group(
    family: Family, tensors: Mapping[str, TensorInfo], sizes: Sizes, num_layers: int | None
) -> tuple[list[Container], list[str]]:
    """Containers by layer, and names that look like experts but are not the family's."""
    names = dict.fromkeys((form.path, form.leaves) for form in family.forms)
    matchers = [
        *([_matcher([family.split_form], expert=True)] if family.reads_split else []),
        *(_matcher([f for f in family.forms if (f.path, f.leaves) == these]) for these in names),
    ]
    containers: dict[tuple[str, tuple[str, ...]], Container] = {}
    unmatched: list[str] = []
    for name, info in tensors.items():
        found = False
        for pattern, forms in matchers:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            form, layer, source = forms[0], match[1], f"{match[1]}.{match[2]}"
            is_bias = match["leaf"] in form.biases
            key = (source, form.leaves)
            group = containers.get(key)
            if group is None:
                group = containers[key] = Container(layer, source, forms, tensors, family, sizes)
            found = True
            if not is_bias:
                expert = int(match[3] or -1)
                group.members[expert, form.leaves.index(match["leaf"])] = name
                break
            group.biases[form.biases.index(match["leaf"])] = name  # of forms with other leaves too
        if not found and (_is_expert(info) or _is_stack(info, sizes)):
            unmatched.append(name)
    groups = [group for group in containers.values() if group.members]
    stacks = {stack_of(group.layer) for group in groups}

    def routed(name: str) -> bool:
        return set_aside(name, stacks, num_layers) is None

    return (
        [group for group in groups if routed(f"{group.source}.")],
        [name for name in unmatched if routed(name)],
    )


def _matcher(forms: list[Form], *, expert: bool = False) -> tuple[re.Pattern[str], list[Form]]:
    """A pattern for the names of forms that have the same names, and the forms."""
    form = forms[0]
    number = r"\.([0-9]{1,6})" if expert else "()"
    leaves = "|".join(map(re.escape, (*form.leaves, *form.biases)))
    path = re.escape(form.path)
    return re.compile(rf"(.+\.[0-9]+)\.({path}){number}\.(?P<leaf>{leaves})"), forms
