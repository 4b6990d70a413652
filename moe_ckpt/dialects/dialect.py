"""What a dialect is: how a quantized checkpoint is spelled, in tensor names and config files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Assignment", "Dialect", "QuantizedExperts", "Spelling"]


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a dialect writes one number format.

    ``suffixes``: what follows the module's name, for each role of the format's parts.
    ``inverse``: roles of which the dialect stores the reciprocal.
    ``shape_suffix``: suffix of a tensor int64 [2] that holds N and K; '' for none.
    ``runtimes``: the runtimes that read a Mixture-of-Experts model written so.
    """

    suffixes: Mapping[str, str]
    runtimes: tuple[str, ...]
    inverse: frozenset[str] = frozenset()
    shape_suffix: str = ""


@dataclass(frozen=True, slots=True)
class QuantizedExperts:
    """The routed experts of one layer: modules ``{module}.{first ... }.{projection}``."""

    module: str
    first: int
    count: int
    projections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What is quantized to which format, by output modules.

    ``experts``: format -> routed experts of layers. ``linears``: format -> linear layers.
    ``kept``: linear layers that stay as they are. ``set_aside``: part of the model that stays
    whole -> linear layers and experts in it. ``kv_cache``: whether k and v are stored as FP8.
    """

    experts: Mapping[str, Sequence[QuantizedExperts]]
    linears: Mapping[str, Sequence[str]]
    kept: Sequence[str]
    set_aside: Mapping[str, Sequence[str]]
    kv_cache: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """All formats, those of experts first."""
        return tuple(dict.fromkeys((*self.experts, *self.linears)))


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to spell quantized checkpoints.

    ``spellings``: format -> how it is written. ``refused``: format -> why it is not written so.
    ``scalar_shape``: shape of a part that is one number, () or (1,).
    ``stacks``: whether it has names for all experts of a layer in one tensor.
    ``mixes``: whether several formats may stand in one checkpoint.
    ``refused_mix``: why these formats may not stand in one checkpoint, '' if they may.
    ``kv_scales``: names of the scales of the KV cache, below the attention module, for k and v;
        None where the dialect has no KV cache scheme.
    ``config_files``: the text of the configuration files from the source's config, which keeps
        its other keys and their order, and an `Assignment`; it raises `LayoutError` for names of
        which no list tells every runtime what is quantized.
    """

    name: str
    summary: str
    spellings: Mapping[str, Spelling]
    config_files: Callable[[Mapping[str, Any], Assignment], dict[str, str]]
    refused: Mapping[str, str] = field(default_factory=dict)
    scalar_shape: tuple[int, ...] = ()
    stacks: bool = False
    mixes: bool = False
    refused_mix: Callable[[Sequence[str]], str] = lambda _formats: ""
    kv_scales: tuple[str, str] | None = None

    def tensor_name(self, format_name: str, module: str, role: str, is_stacked: bool) -> str:
        """The tensor that holds a part of a module, or of all experts' modules.

        Stacked tensors are ModelOpt's: without ``weight``, and with an underscore.
        """
        suffix = self.spellings[format_name].suffixes[role]
        if not is_stacked:
            return f"{module}.{suffix}"
        return module if suffix == "weight" else f"{module}_{suffix}"
