"""Part 1: index and headers agree, and every quantized module has exactly what it needs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from ...dialects.dialect import COMPRESSED_TENSORS, MODELOPT
from ...errors import show, show_some
from ...layouts.roles import module_of
from ...layouts.wrappers import family_of_config
from ...runtimes import SGLANG, VLLM
from ...source.checkpoint import INDEX
from ...source.encodings import ENCODINGS, INPUT_NAMES
from ...source.headers import TensorInfo
from ..findings import UNCHECKED, WARNING, Findings
from ..inventory import Inventory
from ..subject import Subject
from .completeness import COUNT, MISSING, UNLIKE, experts_problems
from .diagnosis import diagnose, stem_of
from .naming import check_names

__all__ = ["check_structure"]

# What weights are stored as -> the ending of the tensor with their shape, if they have one.
_SHAPES = {of.name: of.shape_ending for of in ENCODINGS if of.shape_ending}
_PACKED_STACK = re.compile(r".+\.experts\.[^.]+_packed")
_FUSED_LEAF = re.compile(r"((gate_up|gate|up|down)_proj|w[123]|w13|v1)(_.*)?")

_NUMBER = (
    "vLLM and SGLang leave what memory held in an expert that is missing, and drop one that is too "
    "many; others stop"
)
# What happens at load time where a tensor of this role is missing or no such tensor.
_EFFECTS = {
    "qweight": "vLLM and SGLang check no quantized model for weights that are missing: what memory "
    "held stands in for them; others stop",
    "block_scale": "vLLM and SGLang load experts without a word, with what memory held as their "
    "scales, and cast a scale of another dtype; others stop",
    "global_scale": "vLLM and SGLang load experts without a word, with what memory held as their "
    "scale; a linear layer stops vLLM",
    "channel_scale": "vLLM and SGLang load experts without a word, with what memory held as their "
    "scales",
    "input_scale": "vLLM takes what memory held for NVFP4 and 1.0 for FP8, SGLang takes 1.0: "
    "nothing is said, and all experts of the layer get the largest",
    "leftover": "some runtimes stop at a name that they do not know, others drop it",
    MISSING: _NUMBER,
    COUNT: _NUMBER,
    UNLIKE: "runtimes hold the experts of a layer in one tensor: they stop, or weights are wrong",
}
_NOT_READ = "whether its weights and scales are right, and what loads it, is not known here"
_STOPS = "runtimes build the model from config.json, and stop where the shapes do not fit"


def check_structure(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Check a checkpoint that was opened, beyond what opening it found."""
    _count(subject, inventory, findings)
    check_names(subject, findings)
    _check_index(subject, findings)
    for where, reason in subject.unread:
        findings.add("structure", show(where), reason, _NOT_READ, UNCHECKED)
    if not subject.unread:
        _check_weights(subject, inventory, findings)
        _check_leftovers(subject, inventory, findings)
        static = any(module.format == "nvfp4" for module in inventory.quantized)
        filled = {MISSING: (VLLM, SGLANG), "input_scale": (VLLM,) if static else ()}
        for name, problem, kind in experts_problems(subject, inventory):
            _add(findings, name, problem, _EFFECTS[kind], filled.get(kind, ()))
        _check_detection(subject, inventory, findings)
    _check_fused(subject, inventory, findings)
    _check_alike(inventory, findings)
    _check_ranks(subject, inventory, findings)


def _add(
    findings: Findings, where: str, problem: str, effect: str, harms: tuple[str, ...] = ()
) -> None:
    findings.add("structure", show(where), problem, effect, harms=harms)


def _count(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    counts = findings.counts
    counts["shards"] += len(subject.source.shards)
    counts["tensors"] += len(subject.source.tensors)
    for module in inventory.modules:
        leading = module.shape[0] if len(module.shape) == 3 else 1
        counts[f"matrices in {module.format}"] += leading


def _check_index(subject: Subject, findings: Findings) -> None:
    index, tensors = subject.index, subject.source.tensors
    if index is None:
        return
    named = index.get("weight_map")
    weight_map = named if isinstance(named, dict) else {}
    lost: dict[str, list[str]] = defaultdict(list)
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if name in subject.lost:
            lost[str(shard)].append(name)
        elif not isinstance(shard, str):
            continue
        elif info is None:
            _add(
                findings,
                name,
                f"is not in {show(shard)}, where {INDEX} has it",
                "transformers stops; vLLM and SGLang read whole shards and do not notice",
            )
        elif info.shard != shard:
            _add(
                findings,
                name,
                f"is in {info.shard}, and {INDEX} has it in {show(shard)}",
                "transformers stops; vLLM and SGLang read whole shards and do not notice",
            )
    for shard, names in lost.items():
        _add(
            findings,
            shard,
            f"has {len(names)} tensors by the index, which cannot be read: {show_some(names)}",
            "runtimes stop when they open it",
        )
    for name in tensors if weight_map else ():
        if name not in weight_map:
            _add(
                findings,
                name,
                f"is in {tensors[name].shard}, and {INDEX} does not name it",
                "transformers leaves it out; vLLM and SGLang read whole shards and load it",
            )
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        _add(findings, INDEX, 'has no object "metadata"', "transformers stops with a KeyError")
        return
    nbytes = sum(info.nbytes for info in tensors.values())
    total = metadata.get("total_size")
    if total is not None and total != nbytes and not subject.lost:
        findings.add(
            "structure",
            INDEX,
            f"total_size is {show(total)}; all tensors together have {nbytes} bytes",
            "runtimes do not read it; tools that plan memory or downloads by it are wrong, and the "
            "index may be that of other shards",
            WARNING,
        )


def _check_weights(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report tensors of which no quantized weight can be made, by what is wrong with them."""
    tensors = subject.source.tensors
    used = subject.weights.encodings
    for stem in dict.fromkeys(stem_of(info.name) for info in inventory.leftover):
        for fault in diagnose(stem, tensors, used):
            if fault.tensor in subject.lost:
                continue
            # Experts without a scale, and codes of anything, are what memory held.
            is_filled = fault.is_missing and (".experts." in stem or fault.role == "qweight")
            harms = (VLLM, SGLANG) if is_filled else ()
            _add(findings, fault.tensor, fault.problem, _EFFECTS[fault.role], harms)
    for name, codes in subject.found.twice:
        _add(
            findings,
            name,
            f"is stored twice, also as {show(codes)}",
            "which of them counts differs by runtime",
        )


def _check_leftovers(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report activation scales that no module has a use for, and fused tensors of split experts."""
    tensors = subject.source.tensors
    used = {info.name for module in inventory.modules for _, info in module.parts}
    reported = {finding.where for finding in findings.found}
    # What a scale of activations belongs to is there in part, and that is told.
    torn = {module_of(info.name) for info in inventory.leftover} | {*map(module_of, subject.lost)}
    for name, info in tensors.items():
        if name.endswith(INPUT_NAMES) and name not in used and name not in reported:
            if module_of(name) in torn:
                continue
            _add(findings, name, _why_unused(info), _EFFECTS["leftover"])
            continue
        if ".experts." not in name:
            continue
        experts, _, leaf = name.partition(".experts.")
        found = inventory.experts.get(f"{experts}.experts")
        if found and found.split and _FUSED_LEAF.fullmatch(leaf):
            _add(
                findings,
                name,
                f"{info.dtype} {list(info.shape)} of all experts stands beside the same experts "
                "one by one",
                "a runtime loads both, and what it reads last counts",
            )
    for module in inventory.quantized:
        ending = _SHAPES.get(module.what) if len(module.shape) == 2 else None
        if ending and f"{module.name}.weight{ending}" not in tensors:
            _add(
                findings,
                f"{module.name}.weight{ending}",
                f"is missing beside {module.what}",
                "transformers cannot unpack the weight and stops; vLLM and SGLang do not read it",
            )


def _why_unused(info: TensorInfo) -> str:
    if info.shape not in ((), (1,), (1, 1)):
        return f"has shape {list(info.shape)}; expected one number"
    if info.dtype not in ("F32", "BF16", "F16"):
        return f"is {info.dtype}; expected F32"
    return f"is left over: {show(module_of(info.name))} has no use for an activation scale"


def _check_fused(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report quantized experts in one tensor that are stored as runtimes know them only split."""
    stacked = {
        info.name: info
        for found in inventory.experts.values()
        for module in found.stacked.values()
        for part, info in module.parts
        if part.role == "qweight" and module.is_quantized and subject.method == COMPRESSED_TENSORS
    }
    stacked |= {
        name: info
        for name, info in subject.source.tensors.items()
        if len(info.shape) == 3 and _PACKED_STACK.fullmatch(name)
    }
    for name, info in stacked.items():
        _add(
            findings,
            name,
            f"is {info.dtype} {list(info.shape)}, all experts fused in one tensor, and no runtime "
            f"knows such a tensor of quant_method {show(subject.method) or 'unknown'}: they read "
            "the experts one by one",
            "vLLM finds no weights for its experts and computes with what memory held; others stop",
        )


def _check_alike(inventory: Inventory, findings: Findings) -> None:
    """Report tensors whose dtype or rank is not that of all others of their kind."""
    kinds: dict[tuple[str, str], Counter[tuple[str, int]]] = defaultdict(Counter)
    for module in inventory.quantized:
        for part, info in module.parts:
            kinds[module.what, part.role][info.dtype, len(info.shape)] += 1
    usual = {kind: found.most_common(1)[0][0] for kind, found in kinds.items() if len(found) > 1}
    if not usual:
        return
    for module in inventory.quantized:
        for part, info in module.parts:
            expected = usual.get((module.what, part.role))
            found = (info.dtype, len(info.shape))
            if expected is None or found == expected:
                continue
            problem = f"is {info.dtype} {list(info.shape)}; all others of {module.what} are "
            problem += expected[0] if found[0] != expected[0] else f"of {expected[1]} dimensions"
            _add(findings, info.name, problem, _EFFECTS[part.role])


def _check_ranks(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report scales that are spread over dimensions as only ModelOpt writes them."""
    if not subject.said or subject.said[0].method == MODELOPT:
        return
    for module in inventory.quantized:
        for part, info in module.parts:
            if part.role not in ("block_scale", "channel_scale") or len(module.shape) == 3:
                continue
            expected = part.shape(*module.shape)
            if info.shape != expected:
                _add(
                    findings,
                    info.name,
                    f"has shape {list(info.shape)}; {subject.said[0].method} has {list(expected)}",
                    "runtimes hold it in that shape, and stop",
                )


def _check_detection(subject: Subject, inventory: Inventory, findings: Findings) -> None:
    """Report experts that do not fit config.json, unless what was found says why."""
    detection, config = subject.detection, subject.config
    if detection is not None or findings.found or subject.is_ours:
        return  # a conversion of ours was told what the config leaves open
    family = family_of_config(config)
    is_split = any(found.split for found in inventory.experts.values())
    if family is None or not (is_split and family.reads_split):
        return  # the rules of detection are for sources, which may not be stored so
    for problem in subject.undetected:
        _add(findings, "config.json", problem.removeprefix("config.json: "), _STOPS)
