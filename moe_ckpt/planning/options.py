"""What a plan is asked for. Each option is declared once, as a field of `Options`.

The command line, the record of what a conversion was made from, and the manual are made from the
fields: see `flag_of`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypedDict

from ..dialects import DIALECTS
from ..errors import UsageError, show
from ..formats import DEFAULT_FORMAT
from ..layouts import LAYOUTS, ORDERS
from ..limits import parse_size
from .expert_form import EXPERTS
from .recipe import QUANTIZE, Recipe, built_in, read_recipe

__all__ = ["Flag", "Options", "PlanOptions", "flag_of"]

File = str | os.PathLike[str]

# What an option stands for in the record of a conversion.
Record = Callable[["Options"], str]


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is said on the command line.

    ``choices``: its values, where these are few; None stands for not given. ``is_file``: its
    value is a file, whose content decides the output. ``record``: what of it decides the output,
    as text; None if it decides nothing by itself.
    """

    name: str
    metavar: str
    help: str
    choices: tuple[str | None, ...] = ()
    is_file: bool = False
    record: Record | None = None


def _flag(
    metavar: str,
    help: str,
    *,
    choices: Sequence[str | None] = (),
    is_file: bool = False,
    record: Record | None = None,
) -> dict[str, Flag]:
    metavar = metavar or "|".join(word for word in choices if word is not None)
    return {"flag": Flag("", metavar, help, tuple(choices), is_file, record)}


def _unless_recipe(value: Callable[[Options], str]) -> Record:
    return lambda asked: "" if asked.recipe is not None else value(asked)


class PlanOptions(TypedDict, total=False):
    """Keywords of `make_plan` and `convert`: the fields of `Options`, which says what they mean."""

    stats: Iterable[File]
    format: str | None
    quantize: str | None
    recipe: File | None
    dialect: str | None
    kv_cache: str
    weight_amax: File | None
    allow_requantize: bool
    experts: str
    layout: str | None
    gate_up_order: str | None
    max_shard_size: str | int
    missing_stats: str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a plan; the text beside each says what it means.

    Raises:
        UsageError: an option that is unknown, or two that do not fit together.
    """

    stats: Iterable[File] = field(
        default=(),
        metadata=_flag(
            "FILE",
            "Activation statistics; may be given more than once, the maximum counts.",
            is_file=True,
        ),
    )
    format: str | None = field(
        default=None,
        metadata=_flag(
            "NAME",
            f"Number format, {DEFAULT_FORMAT} if not given; `moe-ckpt formats` lists them.",
            record=_unless_recipe(lambda asked: asked.format or DEFAULT_FORMAT),
        ),
    )
    quantize: str | None = field(
        default=None,
        metadata=_flag(
            "WHAT",
            "experts: routed experts only, if not given; linear: every linear layer.",
            record=_unless_recipe(lambda asked: asked.quantize or QUANTIZE[0]),
        ),
    )
    recipe: File | None = field(
        default=None,
        metadata=_flag(
            "FILE",
            "TOML that says which modules become which format, instead of the two above.",
            is_file=True,
        ),
    )
    dialect: str | None = field(
        default=None,
        metadata=_flag(
            "NAME",
            f"{', '.join(d.name for d in DIALECTS)}; what most runtimes load if not given.",
            record=lambda asked: asked.dialect or "",
        ),
    )
    kv_cache: str = field(
        default="none",
        metadata=_flag(
            "",
            "fp8: write scales for an FP8 KV cache, from output_amax in the statistics.",
            choices=("none", "fp8"),
            record=lambda asked: asked.kv_cache,
        ),
    )
    weight_amax: File | None = field(
        default=None,
        metadata=_flag(
            "FILE",
            "What `moe-ckpt scan` found in IN; saves a pass over it.",
            is_file=True,
        ),
    )
    allow_requantize: bool = field(
        default=False,
        metadata=_flag(
            "",
            "Round 4-bit weights a second time, to another 4-bit format.",
        ),
    )
    experts: str = field(
        default="auto",
        metadata=_flag(
            "",
            "split: a matrix for each; fused: as ModelOpt fuses Llama 4 and gpt-oss; "
            "auto: what most runtimes read.",
            choices=EXPERTS,
            record=lambda asked: asked.experts,
        ),
    )
    layout: str | None = field(
        default=None,
        metadata=_flag(
            "NAME",
            "How IN stores experts, where headers and model type leave it open; see layouts.",
            choices=(None, *LAYOUTS),
            record=lambda asked: asked.layout or "",
        ),
    )
    gate_up_order: str | None = field(
        default=None,
        metadata=_flag(
            "",
            "How gate and up lie in one tensor of IN, where that is open.",
            choices=(None, *ORDERS),
            record=lambda asked: asked.gate_up_order or "",
        ),
    )
    max_shard_size: str | int = field(
        default="5GB",
        metadata=_flag(
            "SIZE",
            "Tensors in one output file.",
            record=lambda asked: str(parse_size(asked.max_shard_size)),
        ),
    )
    missing_stats: str = field(
        default="error",
        metadata=_flag(
            "",
            "constant: input scale 1.0 where statistics are missing.",
            choices=("error", "constant"),
            record=lambda asked: asked.missing_stats,
        ),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", tuple(os.fspath(file) for file in self.stats))
        for option in fields(self):
            flag = flag_of(option)
            value = getattr(self, option.name)
            if flag.choices and value not in flag.choices:
                words = ", ".join(word for word in flag.choices if word is not None)
                raise UsageError(f"{flag.name} {show(value)!r} is unknown; choose {words}")
        if self.recipe is not None and (self.format is not None or self.quantize is not None):
            raise UsageError("--recipe says what --format and --quantize say; give it alone")
        if self.kv_cache == "fp8" and not self.stats_files:
            raise UsageError("--kv-cache fp8 takes its scales from statistics; give --stats FILE")
        parse_size(self.max_shard_size)

    @property
    def stats_files(self) -> tuple[str, ...]:
        """The files of statistics."""
        return tuple(os.fspath(file) for file in self.stats)

    @property
    def decisions(self) -> dict[str, str]:
        """What was chosen that decides an output byte, by the name of its flag."""
        flags = map(flag_of, fields(self))
        return {flag.name: flag.record(self) for flag in flags if flag.record}

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The files that were given, by the name of their flag."""
        found = {}
        for option in fields(self):
            flag, value = flag_of(option), getattr(self, option.name)
            if flag.is_file:
                several = isinstance(value, tuple)
                given = value if several else () if value is None else (value,)
                found[flag.name] = tuple(os.fspath(file) for file in given)
        return found

    def read_recipe(self) -> Recipe:
        """The recipe of the file, or the one that format and quantize stand for."""
        if self.recipe is not None:
            return read_recipe(self.recipe)
        return built_in(self.quantize or QUANTIZE[0], self.format or DEFAULT_FORMAT)


def flag_of(option: Field[Any]) -> Flag:
    """The flag of a field of `Options`; its name is the field's.

    >>> flag_of(fields(Options)[5]).name
    '--kv-cache'
    """
    flag: Flag = option.metadata["flag"]
    return replace(flag, name=f"--{option.name.replace('_', '-')}")


_TEXTS = (f"    {option.name}: {flag_of(option).help}" for option in fields(Options))
Options.__doc__ = "\n".join([(Options.__doc__ or "").rstrip(), "", "    Attributes:", *_TEXTS])
