"""Which runtimes load a checkpoint, by what its formats are, how they are spelled, and its family.

Whether this one is sound is not asked here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ... import dialects
from ...dialects import DIALECTS
from ...errors import show
from ...formats import UNQUANTIZED
from ...layouts.sizes import model_type_of
from ...layouts.table import UNSUPPORTED, find_family
from ...runtimes import RUNTIMES, SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..findings import Runtime
from ..inventory import Inventory
from ..subject import Subject

__all__ = ["runtimes_of"]


_SERVERS = (VLLM, SGLANG)

# What quant_methods other than our dialects' spell, and who reads experts so.
_OTHERS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("modelopt", "fp8-block"): (TRTLLM,),
    ("fp8", "fp8-tensor"): (VLLM, SGLANG),
    ("fp8", "mxfp8"): (SGLANG, TRANSFORMERS),
    ("mxfp8", "mxfp8"): (SGLANG, TRANSFORMERS),
    ("mxfp4", "mxfp4"): RUNTIMES,
}

_MODELOPT_IN_TRANSFORMERS = (
    "it knows no quant_method modelopt: it warns, and takes the codes for weights"
)
_NO_MOE = "it reads no experts with a scale for {} of ModelOpt's"
# (quant_method, format, runtime) -> why not; the rest are said in general.
_WHY_NOT: Mapping[tuple[str, str, str], str] = {
    **{("modelopt", "fp8-channel", runtime): _NO_MOE.format("each row") for runtime in _SERVERS},
    **{("modelopt", "fp8-block", runtime): _NO_MOE.format("each block") for runtime in _SERVERS},
    **{("modelopt", "mxfp4", name): "it knows no algorithm MXFP4" for name in (*_SERVERS, TRTLLM)},
    ("modelopt", "mxfp8", SGLANG): "it wants the scales as weight_scale_inv",
    ("mxfp8", "mxfp8", VLLM): "it wants the scales as weight_scale",
    ("fp8", "mxfp8", VLLM): "it wants the scales as weight_scale",
    ("modelopt", "nvfp4-w4a16", SGLANG): "it takes activations of experts to be of 4 bits",
    ("compressed-tensors", "fp8-block", TRANSFORMERS): "it spreads the scales of experts wrongly",
    ("compressed-tensors", "nvfp4", TRANSFORMERS): "it drops the global scales of experts",
    ("compressed-tensors", "nvfp4-w4a16", TRANSFORMERS): "it drops the global scales of experts",
}


def runtimes_of(subject: Subject, inventory: Inventory) -> list[Runtime]:
    """Every runtime, and why it does not load the checkpoint, if it does not."""
    method = subject.said[0].method if subject.said else ""
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
    if runtime == TRANSFORMERS and method == "modelopt":
        return _MODELOPT_IN_TRANSFORMERS
    for name in dict.fromkeys((*experts, *linears)):
        if name != UNQUANTIZED and runtime not in _readers(method, name):
            known = _WHY_NOT.get((method, name, runtime))
            return known or f"it reads no experts in {name} of quant_method {method}"
    dialect = next((dialect for dialect in DIALECTS if dialect.name == method), None)
    if dialect is None or not experts or not all(f in dialect.spellings for f in experts + linears):
        return ""
    if runtime in dialects.runtimes_of_spelling(dialect, experts, linears):
        return ""
    return "it takes all experts to be of one format, and these are not"


def _readers(method: str, name: str) -> tuple[str, ...]:
    dialect = next((dialect for dialect in DIALECTS if dialect.name == method), None)
    if dialect and name in dialect.spellings:
        return dialect.spellings[name].runtimes
    return _OTHERS.get((method, name), ())


def _of_family(
    runtime: str, subject: Subject, inventory: Inventory, experts: tuple[str, ...]
) -> str:
    """Why a runtime does not read the experts of this model in this form, '' if it does."""
    model_type = model_type_of(subject.config)
    family = find_family(model_type)
    if not inventory.experts:
        return ""
    if family is None:
        reason = UNSUPPORTED.get(model_type, "")
        return f"model type {show(model_type) or 'unknown'} is not known here" + (
            f": {reason}" if reason else ""
        )
    stacked = {m.format for found in inventory.experts.values() for m in found.stacked.values()}
    if not stacked:
        if runtime in family.split_runtimes(model_type):
            return ""
        if runtime == TRANSFORMERS and family.in_transformers:
            return f"it reads the experts of {model_type} only fused"
        return family.instead or f"it has no {model_type}"
    quantized = stacked - {UNQUANTIZED, "mxfp4"}
    if all(runtime in family.fused_runtimes.get(name, ()) for name in quantized):
        return ""
    more = f"; {family.instead}" if family.instead else ""
    return f"it is not known to read {', '.join(experts)} of fused experts of {model_type}{more}"
