"""Experts of a layer: all there, and alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ...formats import find_format
from ...layouts.roles import set_aside
from ...layouts.sizes import sizes_of
from ...source.encodings import input_name_of
from ..inventory import Inventory, Module
from ..subject import Subject

__all__ = ["COUNT", "MISSING", "UNLIKE", "experts_problems"]

# What is wrong with an expert: it is missing or too many, or unlike the others of its layer. What
# else it may be is the role of a tensor that it lacks.
MISSING, COUNT, UNLIKE = "missing", "count", "unlike"


def experts_problems(subject: Subject, inventory: Inventory) -> Iterator[tuple[str, str, str]]:
    """Experts that are missing, too many or unlike the others: where, the problem, its kind."""
    counts = sizes_of(subject.config).experts
    of_model = next(iter(counts)) if len(counts) == 1 else None
    groups = _groups(subject)
    for name, experts in inventory.experts.items():
        # Parts such as a talker have experts of their own number.
        said = None if name in groups or set_aside(name, frozenset(), None) else of_model
        for leaf, stack in experts.stacked.items():
            if said is not None and stack.shape[0] != said:
                yield (
                    f"{name}.{leaf}",
                    f"has {stack.shape[0]} experts, config.json says {counts[said]}={said}",
                    COUNT,
                )
        if not experts.split:
            continue
        E = said if said is not None else max(experts.split) + 1
        projections = experts.projections
        for number in sorted({*range(E), *experts.split}):
            there = experts.split.get(number, {})
            if number >= E:
                yield (
                    f"{name}.{number}",
                    f"is one expert too many; config.json says {counts[E]}={E}",
                    COUNT,
                )
                continue
            for projection in projections:
                matrix = f"{name}.{number}.{projection}"
                if projection not in there and not _is_known_missing(subject, matrix):
                    yield matrix, f"is missing; the layer has {E} experts", MISSING
        for first, last in groups.get(name, [(0, E)]):
            yield from _unlike([m for n, m in experts.split.items() if first <= n < last])


def _groups(subject: Subject) -> dict[str, list[tuple[int, int]]]:
    """The experts of a layer -> the numbers of those of one width, if they are all there."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for experts in subject.detection.experts if subject.detection else ():
        found[experts.output].append((experts.first, experts.first + experts.num_experts))
    return found


def _is_known_missing(subject: Subject, matrix: str) -> bool:
    """Whether some tensor of a matrix is there, or in a shard that cannot be read."""
    names = [f"{matrix}.{leaf}" for leaf in ("weight", "weight_packed", "weight_scale")]
    return any(name in subject.source.tensors or name in subject.lost for name in names)


def _unlike(split: Iterable[Mapping[str, Module]]) -> Iterator[tuple[str, str, str]]:
    """Matrices of one projection whose format or shape is not that of most others."""
    by_projection: dict[str, list[Module]] = defaultdict(list)
    for matrices in split:
        for projection, module in matrices.items():
            by_projection[projection].append(module)
    for modules in by_projection.values():
        looks = Counter((_form(module), module.shape) for module in modules)
        if len(looks) == 1:
            continue
        (form, shape), _ = looks.most_common(1)[0]
        for module in modules:
            if module.shape != shape:
                yield (
                    module.name,
                    f"has shape {list(module.shape)}; the other experts have {list(shape)}",
                    UNLIKE,
                )
            elif _form(module) != form:
                gone = find_format(module.format).same_weights_as == form[0]
                scale = input_name_of(module.what)
                if gone or (form[1] and not _form(module)[1]):
                    missing = "is missing; the other experts have one"
                    yield f"{module.name}.{scale}", missing, "input_scale"
                else:
                    unlike = f"is {module.format}; the other experts are {form[0]}"
                    yield module.name, unlike, UNLIKE


def _form(module: Module) -> tuple[str, bool]:
    return module.format, module.tensor("input_scale") is not None
