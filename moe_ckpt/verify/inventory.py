"""Every matrix of a checkpoint, quantized or not, by its module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..dtypes import FLOATS
from ..formats import UNQUANTIZED, Part
from ..layouts.roles import is_matrix, module_of
from ..source.headers import TensorInfo
from .stacks import read_stacks
from .subject import Subject

__all__ = ["Inventory", "LayerExperts", "Module", "expert_of", "inventory_of", "pairs_of"]

_EXPERT = re.compile(r"(.+\.experts)\.([0-9]{1,6})\.([^.]+)")
_STACK = re.compile(r"(.+\.experts)\.([^.]+)")

# Gate and up, by the names that families give them.
_PAIRS = {"up_proj": "gate_proj", "w3": "w1", "v1": "w1"}


class Module(NamedTuple):
    """A matrix, or a stack of all experts' matrices.

    ``what`` names the encoding, '' if it is not quantized. ``parts`` are those of the format with
    the tensors that hold them, codes first. ``inverse``: roles that hold the reciprocal.
    """

    name: str
    format: str
    what: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, TensorInfo], ...]
    inverse: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether it is."""
        return self.format != UNQUANTIZED

    def tensor(self, role: str) -> TensorInfo | None:
        """The tensor of a part; None if it has none."""
        return next((info for part, info in self.parts if part.role == role), None)


@dataclass(slots=True)
class LayerExperts:
    """The experts of a layer: by number and projection, or stacked by projection."""

    split: dict[int, dict[str, Module]] = field(default_factory=dict)
    stacked: dict[str, Module] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections that some expert has."""
        return tuple(dict.fromkeys(name for found in self.split.values() for name in found))

    @property
    def matrices(self) -> Iterator[Module]:
        """All matrices, those of expert 0 first."""
        yield from self.stacked.values()
        for _, found in sorted(self.split.items()):
            yield from found.values()


@dataclass(frozen=True, slots=True)
class Inventory:
    """``experts``: name of a layer's experts -> them. ``linears``: all other matrices by name.

    ``leftover`` are scales and codes of which no module was made.
    """

    experts: Mapping[str, LayerExperts]
    linears: Mapping[str, Module]
    leftover: tuple[TensorInfo, ...]

    @property
    def modules(self) -> Iterator[Module]:
        """All matrices."""
        for found in self.experts.values():
            yield from found.matrices
        yield from self.linears.values()

    @property
    def quantized(self) -> Iterator[Module]:
        """All that are quantized."""
        return (module for module in self.modules if module.is_quantized)


def expert_of(module: str) -> tuple[str, int, str] | None:
    """The experts of a layer, the number and the projection that a module's name says.

    >>> expert_of("model.layers.3.mlp.experts.12.up_proj")
    ('model.layers.3.mlp.experts', 12, 'up_proj')
    >>> expert_of("model.layers.3.mlp.shared_experts.up_proj")
    """
    match = _EXPERT.fullmatch(module)
    return (match[1], int(match[2]), match[3]) if match else None


def pairs_of(projections: tuple[str, ...]) -> list[tuple[str, str]]:
    """Gate and up among projections: what runtimes build as one.

    >>> pairs_of(("w1", "w2", "w3"))
    [('w1', 'w3')]
    """
    return [(_PAIRS[up], up) for up in projections if _PAIRS.get(up) in projections]


def inventory_of(subject: Subject) -> Inventory:
    """The matrices of a checkpoint."""
    experts: dict[str, LayerExperts] = {}
    linears: dict[str, Module] = {}
    weights = subject.weights
    stacks, leftover = read_stacks(subject.source.tensors, subject.found)
    stacked = {*(info.name for found in stacks.values() for _, info in found.parts)}

    def put(module: Module) -> None:
        match = _EXPERT.fullmatch(module.name)
        if match:
            found = experts.setdefault(match[1], LayerExperts())
            found.split.setdefault(int(match[2]), {})[match[3]] = module
            return
        match = _STACK.fullmatch(module.name) if len(module.shape) == 3 else None
        if match:
            experts.setdefault(match[1], LayerExperts()).stacked[match[2]] = module
        elif len(module.shape) == 2:
            linears[module.name] = module

    for name, stack in stacks.items():
        put(Module(name, stack.format, stack.what, stack.shape, stack.parts))
    for name, info in weights.tensors.items():
        if name in stacked:
            continue
        parts = weights.stored_as(name)
        plain = info.dtype in FLOATS and (is_matrix(name, info.shape) or len(info.shape) == 3)
        if not parts and not plain:
            continue
        module = module_of(name) if name.endswith(".weight") else name.removesuffix("_blocks")
        if parts and parts[0][1].dtype == "I32" and subject.unread:
            continue  # integers packed in a way that is not read may look like those that are
        if not parts:
            parts = ((Part("qweight", info.dtype, 1), info),)
        encoded = weights.encoded(name)
        put(
            Module(
                module,
                encoded.format,
                weights.what_is(name),
                info.shape,
                parts,
                encoded.inverse,
            )
        )
    return Inventory(experts, linears, leftover)
