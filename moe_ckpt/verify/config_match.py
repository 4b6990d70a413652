"""Part 3: what runtimes make of the configuration is what the tensors are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set

from ..announced import HF_QUANT_CONFIG, Announced
from ..dialects.matching import (
    SGLANG,
    TRANSFORMERS,
    TRTLLM,
    UNQUANTIZED,
    VLLM,
    Built,
    UndecidedError,
    built_modules,
)
from ..errors import show, show_some
from ..kv_cache import KV_SCALES
from ..layouts.sizes import model_type_of
from ..modules import reason_to_keep
from .findings import Findings, Runtime
from .inventory import Inventory, Module, expert_of
from .readings import Reading, read_config
from .runtimes import runtimes_of
from .scales import GATE_UP
from .subject import Subject

__all__ = ["built_from", "check_config"]

_HEAD = "lm_head"
# Of these runtimes build none that a configuration could make quantized.
_NEVER_BUILT = ("embedding", "norm", "convolution")
# Families whose router no runtime builds from the configuration, and whose releases do not list it.
_PLAIN_ROUTERS = ("deepseek", "kimi", "glm_moe_dsa")

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
# What vLLM wants of the file, where it goes by it.
_KEYS_BESIDE = {
    **dict.fromkeys(
        ("NVFP4", "W4A16_NVFP4"), ("group_size", "kv_cache_quant_algo", "exclude_modules")
    ),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
}

_WORDS = "runtimes stop at it, or build all modules for another format"
_TWO_FILES = (
    "TensorRT-LLM goes by hf_quant_config.json, vLLM and SGLang by config.json: one is wrong"
)


def check_config(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Check what the files say, for the runtimes that could load the checkpoint.

    If none can, it is checked for all that know such a configuration.
    """
    runtimes = [_after_scales(r, subject, findings) for r in runtimes_of(subject, inventory)]
    misled = _check(subject, inventory, {r.name for r in runtimes if r.loads}, findings)
    findings.runtimes += [
        runtime._replace(why_not="it builds modules otherwise than they are, see above")
        if runtime.loads and runtime.name in misled
        else runtime
        for runtime in runtimes
    ]


def _after_scales(runtime: Runtime, subject: Subject, findings: Findings) -> Runtime:
    """SGLang refuses unequal scales of gate and up where activations stay in 16 bits."""
    formats = {of.format for of in subject.weights.all_encoded()}
    is_refused = (
        runtime.name == SGLANG
        and subject.dialect == "compressed-tensors"
        and "nvfp4-w4a16" in formats
        and any(finding.effect == GATE_UP for finding in findings.found)
    )
    if not (is_refused and runtime.loads):
        return runtime
    return runtime._replace(why_not="it refuses global scales that differ between gate and up")


def _check(
    subject: Subject, inventory: Inventory, loaders: Set[str], findings: Findings
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
        return {runtime for runtime in loaders if quantized}
    readings = {said.where: read_config(said) for said in subject.said}
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
        return {*loaders}
    _check_two_files(subject, readings, findings)
    _check_single_experts(inventory, readings, findings)
    by_runtime = _by_runtime(readings)
    known = {runtime: by_runtime[runtime] for runtime in by_runtime if runtime in loaders}
    misled = _check_modules(subject, modules, known or by_runtime, findings)
    _check_inputs(inventory, by_runtime, findings)
    _check_kv_cache(subject, findings)
    return misled | {runtime for runtime in loaders if runtime not in by_runtime}


def _is_whole(subject: Subject) -> bool:
    """Whether every shard could be read."""
    return not subject.lost and bool(subject.source.shards)


def built_from(inventory: Inventory, findings: Findings) -> Iterator[Built]:
    """What runtimes build of the modules, with the format that their tensors have."""
    for name, experts in inventory.experts.items():
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


def _format(module: Module) -> str | None:
    return None if module.format == UNQUANTIZED else module.format


def _text(found: str | None) -> str:
    return found or "not quantized"


def _list(found: set[str | None]) -> str:
    return " and ".join(sorted(map(_text, found)))


def _by_runtime(readings: Mapping[str, Reading]) -> dict[str, Reading]:
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
    method = subject.said[0].method
    model_type = model_type_of(subject.config)
    for module in modules:
        wrong: dict[str, list[str]] = {}
        for runtime, reading in by_runtime.items():
            if module.format is None and _is_plain_anyway(
                runtime, method, module.name, model_type, reading
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
    return (module.format, found) == ("nvfp4-w4a16", "nvfp4")


def _is_plain_anyway(
    runtime: str, method: str, name: str, model_type: str, reading: Reading
) -> bool:
    """Whether a runtime builds a module in 16 bits, whatever the configuration says."""
    if method not in ("fp8", "fbgemm_fp8", "mxfp8"):
        return False
    if name.rpartition(".")[2] == _HEAD:
        # transformers leaves it out itself if there is no list.
        return runtime != TRANSFORMERS or not reading.has_list
    return reason_to_keep(name) == "router" and model_type.startswith(_PLAIN_ROUTERS)


def _check_two_files(subject: Subject, readings: Mapping[str, Reading], findings: Findings) -> None:
    """config.json and hf_quant_config.json must say the same."""
    beside = next((said for said in subject.said if said.where == HF_QUANT_CONFIG), None)
    config = next((said for said in subject.said if said.where != HF_QUANT_CONFIG), None)
    if beside is None or config is None:
        return
    if config.method != "modelopt":
        findings.add(
            "config",
            HF_QUANT_CONFIG,
            f"is there beside quant_method {show(config.method)!r} in config.json",
            _TWO_FILES,
        )
        return
    one, other = readings[config.where], readings[HF_QUANT_CONFIG]
    differences = [
        f'has no "{key}", which vLLM wants there'
        for key in _KEYS_BESIDE.get(str(beside.said.get("quant_algo")).upper(), ())
        if key not in beside.said
    ]
    algos = [str(said.said.get("quant_algo", "")).upper() for said in (config, beside)]
    if algos[0] != algos[1]:
        differences.append(f"quant_algo is {show(algos[1])}, in config.json {show(algos[0])}")
    for name, here, there in (
        ("exclude_modules", other.entries, one.entries),
        ("quantized_layers", tuple(other.layers.items()), tuple(one.layers.items())),
    ):
        more, less = sorted({*here} - {*there}), sorted({*there} - {*here})
        if more:
            differences.append(f"{name} has {show_some(more)}, and config.json has not")
        if less:
            differences.append(f"{name} lacks {show_some(less)}, which config.json has")
    schemes = [_has_kv_cache(said) for said in (config, beside)]
    if schemes[0] != schemes[1]:
        said = ["an FP8 KV cache" if has else "no FP8 KV cache" for has in schemes]
        differences.append(f"says {said[1]}, and config.json {said[0]}")
    for difference in differences:
        findings.add("config", HF_QUANT_CONFIG, difference, _TWO_FILES)


def _has_kv_cache(said: Announced) -> bool:
    return said.has_kv_cache


def _check_single_experts(
    inventory: Inventory, readings: Mapping[str, Reading], findings: Findings
) -> None:
    """Report experts that are listed one by one where the layer is quantized."""
    for where, reading in readings.items():
        for entry in reading.entries:
            found = None if entry.startswith("re:") else expert_of(_whole_name(entry))
            experts = inventory.experts.get(found[0]) if found else None
            if experts and any(module.is_quantized for module in experts.matrices):
                findings.add(
                    "config",
                    show(entry),
                    f"is listed as not quantized in {where}, one expert of a layer that is",
                    "vLLM builds all experts of the layer in 16 bits, and stops at their shapes",
                )


def _whole_name(entry: str) -> str:
    """An entry as the name of a matrix: an expert may be named without its projection."""
    entry = entry.rstrip("*").rstrip(".")
    return f"{entry}.x" if re.search(r"experts\.[0-9]+$", entry) else entry


def _check_inputs(
    inventory: Inventory, by_runtime: Mapping[str, Reading], findings: Findings
) -> None:
    """Report modules without an activation scale that runtimes take one of."""
    reading = next(iter(by_runtime.values()), None)
    if reading is None or not reading.static:
        return
    bare = {
        module.name: module
        for module in inventory.quantized
        if module.tensor("input_scale") is None
        and module.format.removesuffix("-w4a16") in reading.static
    }
    if not bare:
        return
    for name, experts in inventory.experts.items():
        members = {module.name: module for module in experts.matrices if module.name in bare}
        found = _read(reading, Built(name, tuple(members), None, is_experts=True))
        if members and found in reading.static and not _is_told_already(members, findings):
            _add_bare(next(iter(members.values())), len(members), findings)
    for name in bare:
        if name in inventory.linears and _read(reading, Built(name, (name,), None)):
            _add_bare(bare[name], 1, findings)


def _read(reading: Reading, module: Built) -> str | None:
    try:
        return next(iter(reading.readers.values()))(module)
    except UndecidedError:
        return None


def _is_told_already(members: Mapping[str, Module], findings: Findings) -> bool:
    told = {finding.where for finding in findings.found if finding.part == "structure"}
    return any(where.startswith(f"{name}.input") for name in members for where in told)


def _add_bare(module: Module, count: int, findings: Findings) -> None:
    inputs = "input_global_scale" if module.inverse else "input_scale"
    more = f", and {count - 1} more of the layer lack it too" if count > 1 else ""
    findings.add(
        "structure",
        show(f"{module.name}.{inputs}"),
        f"is missing; the configuration says that activations have a static scale{more}",
        "vLLM takes what memory held for NVFP4 and 1.0 for FP8, SGLang takes 1.0: nothing is said",
    )


def _check_kv_cache(subject: Subject, findings: Findings) -> None:
    """A scheme for the KV cache and its scales go together."""
    tensors = subject.source.tensors
    scales = [name for name in tensors if name.endswith(KV_SCALES)]
    announced = any(said.has_kv_cache for said in subject.said)
    any_scheme = announced or any(said.unknown_kv_cache for said in subject.said)
    if announced and not scales:
        findings.add(
            "config",
            show(subject.said[0].where),
            "says that the KV cache is FP8, and there is no k_scale and v_scale",
            "vLLM warns and takes 1.0: keys and values above 448 are cut off",
        )
    if scales and not any_scheme:
        findings.add(
            "config",
            show(scales[0]),
            f"is one of {len(scales)} scales of a KV cache that no file says is quantized",
            "runtimes keep the cache in 16 bits, and loaders that know no such name stop",
        )
    for name in scales:
        other = re.sub(r"(k_proj\.k|v_proj\.v|k|v)_scale$", _other_scale, name)
        if other not in tensors:
            findings.add(
                "config",
                show(other),
                f"is missing beside {show(name)}",
                "vLLM takes the one for both",
            )


def _other_scale(match: re.Match[str]) -> str:
    return {
        "k_proj.k": "v_proj.v_scale",
        "v_proj.v": "k_proj.k_scale",
        "k": "v_scale",
        "v": "k_scale",
    }[match[1]]
