"""Part 3: what runtimes make of the configuration is what the tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

from ...dialects.config import HF_QUANT_CONFIG
from ...dialects.dialect import COMPRESSED_TENSORS
from ...dialects.matching import Built, UndecidedError, built_modules
from ...dialects.methods import METHODS
from ...dialects.read import Reading, read_config
from ...errors import show, show_some
from ...formats import UNQUANTIZED, find_format
from ...layouts.roles import reason_to_keep
from ...layouts.sizes import model_type_of
from ...layouts.wrappers import text_types_of
from ...loaders.judge import LOADERS
from ...runtimes import RUNTIMES, SGLANG, TRANSFORMERS, TRTLLM, VLLM
from ..findings import Findings, Runtime
from ..inventory import Inventory, Module
from ..subject import Subject
from ..values.scale_values import GATE_UP
from .agreement import check_kv_cache, check_single_experts, check_two_files
from .inputs import check_inputs
from .verdicts import check_recast, runtimes_of

__all__ = ["built_from", "check_config", "readings_by_runtime"]

_HEAD = "lm_head"
_HEAD_OF_DEEPSEEK_V4 = "head"
# Of these runtimes build none that a configuration could make quantized.
_NEVER_BUILT = ("embedding", "norm", "convolution")

_READ_AS_QUANTIZED = (
    "they build it quantized and find no scales: loading stops, or what memory held stands in for "
    "them; transformers fills it with random numbers"
)
_READ_AS_PLAIN = (
    "they build it in 16 bits: loading stops where the shapes do not fit, and codes of 8 bits are "
    "taken for weights without a word"
)
_READ_AS_OTHER = "they build it for another format: loading stops, or the weights are wrong"
_REFUSED = "they stop, for they build it as one module and it is listed in part, or not at all"
_WORDS = "runtimes stop at it, or build all modules for another format"


def check_config(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Check what the files say, for the runtimes that could load the checkpoint.

    If none can, it is checked for all that know such a configuration.
    """
    if subject.unread:
        _, reason = subject.unread[0]
        findings.runtimes += [Runtime(name, unknown=reason) for name in RUNTIMES]
        return
    runtimes = [_after_scales(r, subject, findings) for r in runtimes_of(subject, inventory)]
    check_recast(inventory, findings)
    loading = {r.name for r in runtimes if r.loads and not r.garbage}
    misled = _check(subject, inventory, loading, findings)
    findings.runtimes += [
        runtime._replace(why_not="it builds modules otherwise than they are, see above")
        if runtime.name in misled & loading
        else runtime
        for runtime in runtimes
    ]


def _after_scales(runtime: Runtime, subject: Subject, findings: Findings) -> Runtime:
    """SGLang refuses unequal scales of gate and up where activations stay in 16 bits."""
    formats = {of.format for of in subject.weights.all_encoded()}
    is_refused = (
        runtime.name == SGLANG
        and subject.method == COMPRESSED_TENSORS
        and "nvfp4-w4a16" in formats
        and any(finding.effect == GATE_UP for finding in findings.found)
    )
    if not (is_refused and runtime.loads):
        return runtime
    return runtime._replace(why_not="it refuses global scales that differ between gate and up")


def _check(
    subject: Subject, inventory: Inventory, loading: Set[str], findings: Findings
) -> set[str]:
    """Check the configuration; returns the runtimes that take it otherwise than it is meant."""
    modules = list(built_from(inventory, findings))
    quantized = next((m for m in modules if m.format is not None), None)
    if not subject.said:
        if quantized:
            findings.add(
                "config",
                "config.json",
                f"says nothing of quantization, and {show(quantized.name)} is {quantized.format}",
                "runtimes take the codes for weights, or stop where the shapes do not fit",
            )
        return {runtime for runtime in loading if quantized}
    readings = {said.where: read_config(said.method, said.said) for said in subject.said}
    for where, reading in readings.items():
        for problem in reading.problems:
            findings.add("config", show(where), problem, _WORDS)
    if quantized is None and _is_whole(subject):
        findings.add(
            "config",
            show(subject.said[0].where),
            "says that weights are quantized, and none is",
            "runtimes build quantized modules and find no codes and scales for them",
        )
        return {*loading}
    check_two_files(subject, readings, findings)
    check_single_experts(inventory, readings, findings)
    by_runtime = readings_by_runtime(readings)
    known = {runtime: by_runtime[runtime] for runtime in by_runtime if runtime in loading}
    misled = _check_modules(subject, modules, known or by_runtime, findings)
    check_inputs(inventory, by_runtime, findings)
    check_kv_cache(subject, findings)
    return misled | {runtime for runtime in loading if runtime not in by_runtime}


def _is_whole(subject: Subject) -> bool:
    """Whether every shard could be read."""
    return not subject.lost and bool(subject.source.shards)


def built_from(inventory: Inventory, findings: Findings) -> Iterator[Built]:
    """What runtimes build of the modules, with the format that their tensors have."""
    for name, experts in inventory.experts.items():
        if _is_attention(name) and not experts.split:
            continue
        matrices = list(experts.matrices)
        formats = {_format(module) for module in matrices}
        if len(formats) > 1:
            # Single ones that differ are told of by the structure.
            counted = sorted(formats, key=lambda f: -sum(_format(m) == f for m in matrices))
            if not experts.split:
                findings.add("config", show(name), f"is {_list(formats)}", _REFUSED)
            formats = {counted[0]}
        numbers = sorted(experts.split) or [0]
        projections = experts.projections or ("gate_proj", "up_proj", "down_proj")
        members = tuple(
            f"{name}.{number}.{projection}"
            for number in dict.fromkeys((numbers[0], numbers[-1]))
            for projection in projections
        )
        yield Built(name, members, formats.pop(), is_experts=True)
    asked = {
        name: module
        for name, module in inventory.linears.items()
        if module.is_quantized or reason_to_keep(name) not in _NEVER_BUILT
    }
    for name, members in built_modules(asked).items():
        formats = {_format(asked[member]) for member in members}
        if len(formats) > 1:
            each = [f"{member} is {_text(_format(asked[member]))}" for member in members]
            findings.add(
                "config",
                show(name),
                f"is built of modules that are not quantized alike: {show_some(each)}",
                "runtimes build it as one module of one format, and stop",
            )
            continue
        yield Built(name, members, formats.pop())
    if _HEAD not in asked and not any(name.endswith(f".{_HEAD}") for name in asked):
        yield Built(_HEAD, (_HEAD,), None)  # runtimes build one when it is tied, too


def _is_attention(experts: str) -> bool:
    """Whether these are the experts of an attention, as JetMoE has them: no runtime builds any."""
    return "attention" in experts.rpartition(".")[0].rpartition(".")[2]


def _format(module: Module) -> str | None:
    return None if module.format == UNQUANTIZED else module.format


def _text(found: str | None) -> str:
    return found or "not quantized"


def _list(found: set[str | None]) -> str:
    return " and ".join(sorted(map(_text, found)))


def readings_by_runtime(readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """The file that each runtime goes by."""
    beside = readings.get(HF_QUANT_CONFIG)
    config = next((r for where, r in readings.items() if where != HF_QUANT_CONFIG), None)
    found = {
        VLLM: config or beside,
        SGLANG: config or beside,
        TRTLLM: beside or config,
        TRANSFORMERS: config,
    }
    return {
        runtime: reading
        for runtime, reading in found.items()
        if reading is not None and runtime in reading.readers
    }


def _check_modules(
    subject: Subject,
    modules: Sequence[Built],
    by_runtime: Mapping[str, Reading],
    findings: Findings,
) -> set[str]:
    """Report modules that a runtime builds otherwise than they are; returns these runtimes."""
    misled: set[str] = set()
    method = subject.method
    model_types = (model_type_of(subject.config), *text_types_of(subject.config))
    for module in modules:
        wrong: dict[str, list[str]] = {}
        for runtime, reading in by_runtime.items():
            if module.format is None and _is_plain_anyway(
                runtime, method, module.name, model_types, reading
            ):
                continue
            try:
                found = _text(reading.readers[runtime](module))
            except UndecidedError:
                found = "?"
            if found != _text(module.format) and not _is_told(module, found):
                wrong.setdefault(found, []).append(runtime)
        for found, runtimes in wrong.items():
            misled.update(runtimes)
            actual = _text(module.format)
            reads = "cannot tell what it is" if found == "?" else f"read that it is {found}"
            effect = _REFUSED
            if found != "?":
                effect = _READ_AS_OTHER if module.format else _READ_AS_QUANTIZED
                effect = _READ_AS_PLAIN if found == _text(None) else effect
            findings.add(
                "config", show(module.name), f"is {actual}, and {_and(runtimes)} {reads}", effect
            )
    return misled


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _is_told(module: Built, found: str) -> bool:
    """Whether activation scales are all that is missing, which `_check_inputs` tells of."""
    return module.format is not None and find_format(module.format).same_weights_as == found


def _is_plain_anyway(
    runtime: str, method: str, name: str, model_types: Sequence[str], reading: Reading
) -> bool:
    """Whether a runtime builds a module in 16 bits, whatever the configuration says."""
    if name.rpartition(".")[2] == _HEAD or name == _HEAD_OF_DEEPSEEK_V4:
        known = METHODS.get(method)
        if known is None or not known.has_plain_head:
            return False
        # transformers leaves it out itself if there is no list.
        return runtime != TRANSFORMERS or not reading.has_list
    loader = next(loader for loader in LOADERS if loader.name == runtime)
    return loader.built_plain(model_types, method, name)
