"""Which runtimes load a checkpoint, by what its formats are, how they are spelled, and its family.

Whether this one is sound is not asked here.
"""

from __future__ import annotations

from ...dialects import dialect_that_writes, runtimes_of_spelling
from ...dialects.methods import METHODS
from ...errors import show
from ...formats import UNQUANTIZED
from ...layouts.sizes import model_type_of
from ...layouts.table import UNSUPPORTED
from ...layouts.wrappers import family_of_config
from ...runtimes import RUNTIMES, TRANSFORMERS
from ..findings import Runtime
from ..inventory import Inventory
from ..subject import Subject

__all__ = ["runtimes_of"]


def runtimes_of(subject: Subject, inventory: Inventory) -> list[Runtime]:
    """Every runtime, and why it does not load the checkpoint, if it does not."""
    method = subject.method
    experts = {
        module.format: None for found in inventory.experts.values() for module in found.matrices
    }
    linears = {module.format: None for module in inventory.linears.values() if module.is_quantized}
    formats = tuple(dict.fromkeys((*experts, *linears)))
    found = []
    for runtime in RUNTIMES:
        why_not = _of_family(runtime, subject, inventory, tuple(experts))
        if method and formats and any(name != UNQUANTIZED for name in formats):
            why_not = _of_formats(runtime, method, tuple(experts), tuple(linears)) or why_not
        found.append(Runtime(runtime, why_not))
    return found


def _of_formats(
    runtime: str, method: str, experts: tuple[str, ...], linears: tuple[str, ...]
) -> str:
    """Why a runtime does not read these formats in this spelling, '' if it does."""
    known = METHODS.get(method)
    if known and runtime in known.why_not:
        return known.why_not[runtime]
    for name in dict.fromkeys((*experts, *linears)):
        spelling = known.spelling_of(name) if known else None
        if name != UNQUANTIZED and not (spelling and runtime in spelling.runtimes):
            reason = spelling.why_not.get(runtime) if spelling else None
            return reason or f"it reads no experts in {name} of quant_method {method}"
    dialect = dialect_that_writes(method)
    if dialect is None or not experts or not all(f in dialect.spellings for f in experts + linears):
        return ""
    if runtime in runtimes_of_spelling(dialect, experts, linears):
        return ""
    return "it takes all experts to be of one format, and these are not"


def _of_family(
    runtime: str, subject: Subject, inventory: Inventory, experts: tuple[str, ...]
) -> str:
    """Why a runtime does not read the experts of this model in this form, '' if it does."""
    model_type = model_type_of(subject.config)
    family = family_of_config(subject.config)
    if not inventory.experts:
        return ""
    if family is None:
        reason = UNSUPPORTED.get(model_type, "")
        return f"model type {show(model_type) or 'unknown'} is not known here" + (
            f": {reason}" if reason else ""
        )
    stacked = {m.format for found in inventory.experts.values() for m in found.stacked.values()}
    if runtime == TRANSFORMERS and family.renamed_in_transformers and subject.method:
        return f"it names linear layers of {model_type} otherwise, and reads it unquantized only"
    if not stacked:
        if runtime in family.split_runtimes(model_type):
            return ""
        if family.released_as and runtime != TRANSFORMERS:
            return f"it has {model_type} as architecture {family.released_as[0]} only"
        if runtime == TRANSFORMERS and family.in_transformers:
            return f"it reads the experts of {model_type} only fused"
        return family.instead or f"it has no {model_type}"
    quantized = stacked - {UNQUANTIZED, "mxfp4"}
    if all(runtime in family.fused_runtimes.get(name, ()) for name in quantized):
        return ""
    more = f"; {family.instead}" if family.instead else ""
    return f"it is not known to read {', '.join(experts)} of fused experts of {model_type}{more}"
