"""What is to be changed in a checkpoint, collected before a plan is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..formats import find_format
from ..source.headers import TensorInfo
from ..verify.inventory import Inventory, Module
from ..verify.subject import Subject
from ..verify.values.windows import look_at

__all__ = ["KINDS", "Added", "Draft", "Mend", "Shared", "draft_of"]

# What may be mended -> what is done to it.
KINDS: Mapping[str, str] = {
    "reciprocal": "stored as its reciprocal, and inverted",
    "exact": "brought under one global scale, and every weight stays what it is",
    "rounded": "brought under one global scale, and blocks are rounded a second time",
    "input_scale": "given an activation scale",
    "dtype": "given the dtype that runtimes hold; the bytes stay",
    "config": "written from the tensors",
    "index": "written from the shards",
}


class Mend(NamedTuple):
    """Something that is mended: its kind, the tensor or file, and what becomes of it.

    ``blocks``: how many blocks are rounded a second time, at most.
    """

    kind: str
    where: str
    what: str
    blocks: int = 0


class Added(NamedTuple):
    """A tensor of one number that is put beside the codes of its module."""

    codes: TensorInfo
    shape: tuple[int, ...]
    number: float


class Shared(NamedTuple):
    """Matrices that runtimes build as one, brought under one global scale.

    ``inverse``: whether what the source stores is the reciprocal, whatever its spelling says.
    """

    modules: tuple[Module, ...]
    inverse: bool


@dataclass(slots=True)
class Draft:
    """A checkpoint, and what is to be changed in it.

    ``values``: the scales of whole matrices as they are stored, by tensor. ``numbers``: what such
    a tensor is to hold instead. ``dtypes``: tensor -> the dtype it is to have. ``problems``: what
    would have to be changed and cannot be, by the tensor that it is about. ``mended``: tensors of
    which nothing is left to tell.
    """

    subject: Subject
    inventory: Inventory
    values: Mapping[str, float]
    numbers: dict[str, float] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    added: dict[str, Added] = field(default_factory=dict)
    shared: list[Shared] = field(default_factory=list)
    mends: list[Mend] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    mended: set[str] = field(default_factory=set)

    def stored(self, module: Module, role: str) -> float | None:
        """The number that a scale of a matrix is to hold; None if it has no sound one."""
        info = module.tensor(role)
        if info is None:
            return None
        value = self.numbers.get(info.name, self.values.get(info.name))
        return value if value is not None and np.isfinite(value) and value > 0 else None

    def scale(self, module: Module, role: str) -> float | None:
        """The same as it multiplies."""
        value = self.stored(module, role)
        return value if value is None or role not in module.inverse else 1 / value

    def put(self, info: TensorInfo, number: float) -> None:
        """Let a tensor of one number hold another."""
        self.numbers[info.name] = number
        self.mended.add(info.name)


def draft_of(subject: Subject, inventory: Inventory) -> Draft:
    """A draft that changes nothing yet; reads the scales of whole matrices."""
    wanted = [
        info
        for module in inventory.quantized
        for part, info in module.parts
        if part.is_scalar and len(module.shape) == 2 and info.dtype in ("F32", "BF16", "F16")
    ]
    return Draft(subject, inventory, look_at(subject.source.shards.values(), wanted).values)


def is_nvfp4(module: Module) -> bool:
    """Whether a matrix is in NVFP4, and whole."""
    has_all = module.tensor("global_scale") is not None and len(module.shape) == 2
    return has_all and find_format(module.format).weights == "nvfp4"
