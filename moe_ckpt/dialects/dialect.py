"""What a dialect is: how a quantized checkpoint is spelled, in tensor names and config files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..formats import UNQUANTIZED

__all__ = ["Assignment", "Dialect", "QuantizedExperts", "Spelling"]
__all__ += ["COMPRESSED_TENSORS", "FP8", "MODELOPT", "plain_spelling", "refused", "written"]

# The ``quant_method``s that are written here; each is the name of its dialect.
MODELOPT, COMPRESSED_TENSORS, FP8 = "modelopt", "compressed-tensors", "fp8"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one number format is spelled under one ``quant_method``.

    ``format``: the number format. ``what``: what people call weights that are stored so.
    ``suffixes``: what follows the module's name, for each role of the format's parts.
    ``runtimes``: the runtimes that read a Mixture-of-Experts model written so.
    ``why_not``: why a runtime does not, where more can be said than that.
    ``not_written``: why it is only read here, and not written; '' if it is written.
    ``is_source``: whether sources that are quantized so are read; verification reads all.
    ``inverse``: roles of which the reciprocal is stored.
    ``shape_suffix``: suffix of a tensor int64 [2] that holds N and K; '' for none.
    ``scale_dtypes``: the dtypes in which a role is found in sources, where they are not those
        that stand for the dtype of its part, see `source.encodings`.
    ``code_dtypes``: the dtypes in which codes are found in sources besides that of their part.
    ``kept_dtypes``: of these, those that a role keeps where the weights of a source stay.
    """

    format: str
    what: str
    suffixes: Mapping[str, str]
    runtimes: tuple[str, ...]
    why_not: Mapping[str, str] = field(default_factory=dict)
    not_written: str = ""
    is_source: bool = True
    inverse: frozenset[str] = frozenset()
    shape_suffix: str = ""
    scale_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    code_dtypes: tuple[str, ...] = ()
    kept_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        """Whether several codes share an item, and the name of their tensor says so."""
        return self.suffixes["qweight"].endswith("_packed")


def plain_spelling(runtimes: tuple[str, ...]) -> Spelling:
    """How what is not quantized is spelled in every dialect."""
    return Spelling(UNQUANTIZED, "", {"qweight": "weight"}, runtimes)


def written(table: Sequence[Spelling]) -> dict[str, Spelling]:
    """The formats of a table that are written, and how."""
    return {row.format: row for row in table if not row.not_written}


def refused(table: Sequence[Spelling]) -> dict[str, str]:
    """The formats of a table that are only read, and why."""
    return {row.format: row.not_written for row in table if row.not_written}


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
    ``moved``: the formats of which all weights are those of the source, codes and scales.
    """

    experts: Mapping[str, Sequence[QuantizedExperts]]
    linears: Mapping[str, Sequence[str]]
    kept: Sequence[str]
    set_aside: Mapping[str, Sequence[str]]
    kv_cache: bool = False
    moved: frozenset[str] = frozenset()

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
