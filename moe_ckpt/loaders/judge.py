"""Which runtimes load what is written: the one answer that plans, results and `verify` give.

It follows from the family's row, from how the dialect spells each format, and from what is known
of each loader. Whether the numbers are sound is not asked here.
"""

from __future__ import annotations

from ..dialects import dialect_that_writes, runtimes_of_spelling
from ..dialects.dialect import FP8
from ..dialects.methods import METHODS
from ..errors import show
from ..formats import UNQUANTIZED, find_format
from ..layouts.family import Family
from ..layouts.table import UNSUPPORTED
from ..runtimes import TRANSFORMERS
from .loader import Loader, Verdict, Written
from .sglang import SGLANG_LOADER
from .tensorrt_llm import TENSORRT_LLM_LOADER
from .transformers import TRANSFORMERS_LOADER
from .vllm import VLLM_LOADER

__all__ = ["LOADERS", "is_built_plain", "verdicts_on"]

LOADERS = (VLLM_LOADER, SGLANG_LOADER, TENSORRT_LLM_LOADER, TRANSFORMERS_LOADER)


def verdicts_on(written: Written) -> tuple[Verdict, ...]:
    """Every runtime, and whether it loads what is written."""
    return tuple(_verdict(loader, written) for loader in LOADERS)


def is_built_plain(family: Family, model_type: str, method: str, module: str) -> bool:
    """Whether every server that has the model builds a linear layer in 16 bits, in any format.

    transformers is not asked: it quantizes what the list leaves to it, and calls some layers by
    their weights alone, which are codes then.
    """
    servers = [
        loader
        for loader in LOADERS
        if loader.name in family.split_runtimes(model_type) and loader.name != TRANSFORMERS
    ]
    return bool(servers) and all(
        loader.built_plain((model_type,), method, module) for loader in servers
    )


def _verdict(loader: Loader, written: Written) -> Verdict:
    met = list(loader.met(written))
    stops = next((limit.why for limit in met if not limit.is_garbage), "")
    why_not = (
        _of_family(loader.name, written)
        or stops
        or (_of_formats(loader.name, written) if not met else "")
        or _of_plain(loader, written)
        or (f"it stops at {show(written.unread[0])}" if loader.knows_all and written.unread else "")
    )
    garbage = next((limit.why for limit in met if limit.is_garbage), "") or _of_dtypes(
        loader, written
    )
    return Verdict(loader.name, why_not, "" if why_not else garbage)


def _of_formats(runtime: str, written: Written) -> str:
    """Why a runtime does not read these formats in this spelling, '' if it does."""
    method, formats = written.method, written.formats
    if not method or all(name == UNQUANTIZED for name in formats):
        return ""
    known = METHODS.get(method)
    if known and runtime in known.why_not:
        return known.why_not[runtime]
    for name in formats:
        spelling = known.spelling_of(name) if known else None
        if name != UNQUANTIZED and not (spelling and runtime in spelling.runtimes):
            reason = spelling.why_not.get(runtime) if spelling else None
            return reason or f"it reads no experts in {name} of quant_method {method}"
    dialect = dialect_that_writes(method)
    experts = written.experts
    if dialect is None or not experts or not all(name in dialect.spellings for name in formats):
        return ""
    if runtime in runtimes_of_spelling(dialect, experts, tuple(written.linears)):
        return ""
    return "it takes all experts to be of one format, and these are not"


def _of_family(runtime: str, written: Written) -> str:
    """Why a runtime does not read the experts of this model in this form, '' if it does."""
    if not written.experts:
        return ""
    model_type, family = written.model_type, written.family
    if family is None:
        reason = UNSUPPORTED.get(model_type, "")
        return f"model type {show(model_type) or 'unknown'} is not known here" + (
            f": {reason}" if reason else ""
        )
    if runtime == TRANSFORMERS and family.renamed_in_transformers and written.method:
        return f"it names linear layers of {model_type} otherwise, and reads it unquantized only"
    if written.is_fused:
        return _of_fused(runtime, family, written)
    if runtime in family.split_runtimes(model_type):
        return ""
    if written.method == FP8 and {*written.experts} <= {*family.as_released}:
        return ""
    if family.released_as and runtime != TRANSFORMERS:
        return f"it has {model_type} as architecture {family.released_as[0]} only"
    if runtime == TRANSFORMERS and family.in_transformers:
        return f"it reads the experts of {model_type} only fused"
    return family.instead or f"it has no {model_type}"


def _of_fused(runtime: str, family: Family, written: Written) -> str:
    quantized = [name for name in written.experts if name not in (UNQUANTIZED, "mxfp4")]
    if all(runtime in family.fused_runtimes.get(name, ()) for name in quantized):
        return ""
    more = f"; {family.instead}" if family.instead else ""
    return (
        f"it is not known to read {', '.join(written.experts)} of fused experts of "
        f"{written.model_type}{more}"
    )


def _of_plain(loader: Loader, written: Written) -> str:
    """Why quantized linear layers stop a runtime that builds them in 16 bits."""
    for name, modules in written.linears.items():
        for module in modules:
            if loader.built_plain(written.model_types, written.method, module, name):
                return f"it builds {show(module)} in 16 bits, whatever the configuration says"
    return ""


def _of_dtypes(loader: Loader, written: Written) -> str:
    """What a loader makes of scales in another dtype than the one that it holds."""
    for (name, role), dtype in written.dtypes.items():
        part = next(part for part in find_format(name).parts if part.role == role)
        if (part.dtype, dtype) in loader.converts:
            return (
                f"it holds the scales of {name} as {part.dtype} and converts {dtype} by value, "
                "which makes other numbers of them"
            )
    return ""
