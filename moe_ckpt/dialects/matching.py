"""What runtimes build of the modules of a checkpoint, and whether they all read a list alike.

Each runtime asks about the modules it builds: q/k/v and gate/up are one module there, and the
experts of a layer are one. How it decides differs by runtime and kind of configuration: see
``match`` of each dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutError, show
from ..formats import UNQUANTIZED
from .dialect import Assignment, QuantizedExperts

__all__ = ["Built", "Reader", "Rule", "UndecidedError"]
__all__ += ["all_or_none", "built_modules", "built_of", "check", "formats_of"]

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# SGLang's other name of a fused module.
_ALSO = {"fused_qkv_a_proj": "fused_qkv_a_proj_with_mqa"}
_HEAD = "lm_head"  # also when tied to the embeddings: vLLM builds one either way
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

# Asked for a module that a runtime builds, and its members: is it excluded?
Rule = Callable[[str, tuple[str, ...]], bool]


@dataclass(frozen=True, slots=True)
class Built:
    """A module that runtimes build: a linear layer, fused or not, or the experts of a layer.

    ``members``: its linear layers in the checkpoint; of experts those of the first and the last.
    ``format``: what it is quantized to; None if it is not.
    """

    name: str
    members: tuple[str, ...]
    format: str | None
    is_experts: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """The members by which lists name it: for experts, which are listed whole, itself."""
        return (self.name,) if self.is_experts else self.members

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a list may use for it."""
        parent, _, leaf = self.name.rpartition(".")
        also = (f"{parent}.{_ALSO[leaf]}",) if leaf in _ALSO else ()
        return tuple(dict.fromkeys((*self.members, self.name, *also)))


# How a runtime reads a configuration: the format of a module, None for not quantized.
Reader = Callable[[Built], "str | None"]


class UndecidedError(Exception):
    """A runtime refuses to load a module: parts of a fused one differ, or nothing lists it."""


def built_modules(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules a runtime builds for these, with their members: fused where all are there.

    >>> built_modules(["l.attn.q_proj", "l.attn.k_proj", "l.attn.v_proj", "l.attn.o_proj"])
    {'l.attn.qkv_proj': ('l.attn.q_proj', 'l.attn.k_proj', 'l.attn.v_proj'), \
'l.attn.o_proj': ('l.attn.o_proj',)}
    """
    names = set(modules)
    built: dict[str, tuple[str, ...]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for fused, leaves in FUSED.items():
            members = tuple(f"{parent}.{name}" for name in leaves)
            if leaf in leaves and names.issuperset(members):
                built[f"{parent}.{fused}"] = members
                break
        else:
            built[module] = (module,)
    return built


def formats_of(assignment: Assignment) -> tuple[str, ...]:
    """The formats that quantize, those of experts first."""
    return tuple(name for name in assignment.formats if name != UNQUANTIZED)


def built_of(assignment: Assignment) -> list[Built]:
    """Everything runtimes build, with its format; the output head always.

    Raises:
        LayoutError: linear layers that runtimes fuse are not quantized alike.
    """
    found = [
        Built(
            layer.module, _matrices(layer), None if name == UNQUANTIZED else name, is_experts=True
        )
        for name, layers in assignment.experts.items()
        for layer in layers
    ]
    formats: dict[str, str | None] = {_HEAD: None}
    formats.update(dict.fromkeys(_left(assignment)))
    for name, linears in assignment.linears.items():
        formats.update(dict.fromkeys(linears, None if name == UNQUANTIZED else name))
    for experts in [name for name in formats if name.rpartition(".")[2] == "experts"]:
        del formats[experts]
        members = tuple(f"{experts}.0.{projection}" for projection in _PROJECTIONS)
        found.append(Built(experts, members, None, is_experts=True))
    for module, members in built_modules(formats).items():
        if len({formats[member] for member in members}) > 1:
            raise LayoutError(
                f"{show(module)}: runtimes build it as one module, and its parts are not "
                "quantized alike; quantize all of them to one format, or none"
            )
        found.append(Built(module, members, formats[members[0]]))
    return found


def _left(assignment: Assignment) -> list[str]:
    """Modules that stay as they are."""
    inside = [module for modules in assignment.set_aside.values() for module in modules]
    return [*assignment.kept, *inside]


def _matrices(layer: QuantizedExperts) -> tuple[str, ...]:
    numbers = dict.fromkeys((layer.first, layer.first + layer.count - 1))
    return tuple(f"{layer.module}.{n}.{p}" for n in numbers for p in layer.projections)


def check(readers: Mapping[str, Reader], modules: Sequence[Built], what: str) -> None:
    """Raise `LayoutError` unless every runtime reads the format of every module.

    ``what``: what the runtimes read, for the message.
    """
    for runtime, read in readers.items():
        for module in modules:
            try:
                found: str | None = read(module)
            except UndecidedError:
                found = "?"
            if found != module.format:
                raise LayoutError(
                    f"{show(module.name)}: no {what} tells {runtime} that it is "
                    f"{f'quantized to {module.format}' if module.format else 'not quantized'}, "
                    "for its name is part of another's, or another's of it"
                )


def all_or_none(members: tuple[str, ...], listed: Callable[[str], bool]) -> bool:
    """Whether all members of a module are listed; `UndecidedError` if only some are."""
    found = [listed(name) for name in members]
    if any(found) and not all(found):
        raise UndecidedError(members)
    return all(found)
