"""Whether the checkpoint is the whole model that config.json describes."""

from __future__ import annotations

from ...errors import LayoutError
from ...layouts.missing import MTP, PARTIAL, what_is_missing
from ...layouts.wrappers import family_of_config
from ...runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..findings import ERROR, WARNING, Findings
from ..subject import Subject

__all__ = ["check_whole_model"]

_NOT_NOTICED = (
    "vLLM and SGLang check no quantized model for weights that are missing: they compute with what "
    "memory held; transformers fills them with random numbers, and only logs that; TensorRT-LLM "
    "stops"
)
_SILENT = (VLLM, SGLANG, TRANSFORMERS)
_NOT_DRAFTED = (
    "the model itself works; speculative decoding with these layers stops, or drafts noise"
)


def check_whole_model(subject: Subject, findings: Findings) -> None:
    """Report layers, parts of layers and what is beside them that the model should have.

    Where nothing but layers is there, this is said, and those that are missing are a warning.
    """
    detection = subject.detection
    names = {**subject.source.tensors, **dict.fromkeys(subject.lost)}
    try:
        lacks = what_is_missing(
            names,
            subject.config,
            family_of_config(subject.config),
            detection.stacks if detection else frozenset(),
        )
    except LayoutError:
        return  # of the number of layers, which is told with the experts
    is_partial = any(lack.kind == PARTIAL for lack in lacks)
    for lack in lacks:
        if lack.kind == PARTIAL:
            findings.skipped["whole model"] = lack.problem
            continue
        grade = WARNING if is_partial or lack.kind == MTP else ERROR
        effect = _NOT_DRAFTED if lack.kind == MTP else _NOT_NOTICED
        told = {"harms": _SILENT, "stops": (TRTLLM,)} if grade == ERROR else {}
        findings.add("structure", lack.where, lack.problem, effect, grade, **told)
