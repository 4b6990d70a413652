"""Dialects: how a quantized checkpoint is spelled, in tensor names and config files.

A dialect turns the roles of a format's parts into tensor suffixes, and the choice of what is
quantized into configuration. It knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from ..formats import UNQUANTIZED
from ..runtimes import TRANSFORMERS
from . import plain
from .compressed_tensors import write as compressed_tensors
from .dialect import Assignment, Dialect, QuantizedExperts, Spelling
from .fp8 import write as fp8
from .modelopt import write as modelopt

__all__ = ["DIALECTS", "Assignment", "Dialect", "QuantizedExperts", "Spelling"]
__all__ += ["dialect_for", "dialect_that_writes", "find_dialect", "runtimes_of_spelling"]

# In the order in which they are tried.
DIALECTS: tuple[Dialect, ...] = (
    modelopt.DIALECT,
    compressed_tensors.DIALECT,
    fp8.DIALECT,
    plain.DIALECT,
)

# A format has the first dialect that writes it, unless more runtimes read another.
_DEFAULTS = {"fp8-block": fp8.DIALECT}


def find_dialect(name: str) -> Dialect:
    """The dialect of that name; `UsageError` lists the known ones."""
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise UsageError(f"dialect {name!r} is unknown; choose {known}")


def dialect_that_writes(method: str) -> Dialect | None:
    """The dialect of a ``quant_method``, which has its name; None if nothing here writes it."""
    found = (d for d in DIALECTS if d.name == method and d is not plain.DIALECT)
    return next(found, None)


def dialect_for(formats: Sequence[str], wanted: str | None = None) -> Dialect:
    """The dialect named, or the one that most runtimes read.

    Args:
        formats: all formats of the checkpoint; bf16 beside others is what stays as it is.
        wanted: the name of a dialect; None for the default.

    Raises:
        UsageError: the dialect is unknown, or does not write these formats; or none does.
    """
    quantized = tuple(dict.fromkeys(name for name in formats if name != UNQUANTIZED))
    asked = quantized or (UNQUANTIZED,)
    if wanted is not None:
        dialect = find_dialect(wanted)
        reason = _refusal(dialect, asked)
        if reason:
            raise UsageError(
                f"dialect {wanted} does not write {' with '.join(asked)}: {reason}{_instead(asked)}"
            )
        return dialect
    if len(asked) == 1 and asked[0] in _DEFAULTS:
        return _DEFAULTS[asked[0]]
    for dialect in DIALECTS:
        if not _refusal(dialect, asked):
            return dialect
    reasons = "; ".join(f"{dialect.name}: {_refusal(dialect, asked)}" for dialect in DIALECTS)
    raise UsageError(f"no dialect writes {' with '.join(asked)}: {reasons}")


def runtimes_of_spelling(
    dialect: Dialect, experts: Sequence[str], linears: Sequence[str] = ()
) -> tuple[str, ...]:
    """The runtimes that read experts and linear layers of these formats in the dialect.

    transformers takes all experts to be of one format, and drops those that are not packed where
    that format is: it cannot load a layer of experts that stays as it is then. If all experts
    stay, it takes the format of linear layers for theirs (integrations/compressed_tensors.py,
    get_experts_scheme and CompressedTensorsDequantize).
    """
    known = [dialect.spellings[name].runtimes for name in (*experts, *linears)]
    theirs = {name for name in experts if name != UNQUANTIZED}
    taken = theirs or {name for name in linears if name != UNQUANTIZED}
    packed = any(dialect.spellings[n].is_packed for n in taken)
    unread = len(theirs) > 1 or (packed and UNQUANTIZED in experts)
    return tuple(
        name
        for name in known[0]
        if all(name in runtimes for runtimes in known) and not (unread and name == TRANSFORMERS)
    )


def _refusal(dialect: Dialect, formats: Sequence[str]) -> str:
    """Why a dialect does not write these formats, '' if it does."""
    if formats == (UNQUANTIZED,) and dialect is not plain.DIALECT:
        return "nothing is quantized; that is dialect none"
    for name in formats:
        if name in dialect.refused:
            return f"{dialect.refused[name]} ({name})"
        if name not in dialect.spellings:
            return f"it has no {name}"
    if len(formats) > 1 and not dialect.mixes:
        return "it has one format for all modules"
    return dialect.refused_mix(formats) if len(formats) > 1 else ""


def _instead(formats: Sequence[str]) -> str:
    names = [dialect.name for dialect in DIALECTS if not _refusal(dialect, formats)]
    return f"; choose {' or '.join(names)}" if names else ""
