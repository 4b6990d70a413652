"""Which runtimes read the result, and whether experts are written split or fused for them."""

from __future__ import annotations

from collections.abc import Sequence

from ..dialects import Dialect
from ..errors import LayoutError, show, show_some
from ..formats import UNQUANTIZED
from ..layouts import Detection
from ..runtimes import TRANSFORMERS

__all__ = ["EXPERTS", "form_of_experts", "runtime_warnings"]

EXPERTS = ("auto", "split", "fused")


def form_of_experts(
    detection: Detection, wanted: str, formats: Sequence[str], dialect: Dialect
) -> str:
    """The form of experts, split or fused, for ``wanted`` as in `EXPERTS`, in these formats.

    "auto" is what most runtimes read, split if both are read by as many.

    Raises:
        LayoutError: no runtime reads that form, or the source does not have it.
    """
    family, model_type = detection.family, show(detection.model_type)
    form = wanted
    if wanted == "fused" and not dialect.stacks:
        raise LayoutError(
            f"--experts fused: dialect {dialect.name} has no names for experts in one tensor; "
            "choose --dialect modelopt, or say --experts split"
        )
    if wanted == "auto":
        known_fused = family.fused_runtimes if dialect.stacks else {}
        fused = max((len(known_fused.get(name, ())) for name in formats), default=0)
        split = len(family.split_runtimes(detection.model_type))
        known = all(name in known_fused for name in formats)
        form = "fused" if fused > split or (known and not split) else "split"
        if form == "split" and not split and family.instead:
            raise LayoutError(
                f"model type {model_type}: no runtime is known to read its experts quantized one "
                f"by one: {family.instead}. To write them so all the same, say --experts split"
            )
    if form == "fused":
        if not family.fused_runtimes:
            raise LayoutError(
                f"--experts fused: ModelOpt has no fused export of model type {model_type}; say "
                "--experts split"
            )
        unknown = [name for name in formats if name not in family.fused_runtimes]
        if unknown:
            raise LayoutError(
                f"--experts fused: of model type {model_type} it is known for "
                f"{', '.join(family.fused_runtimes)}, not for {', '.join(unknown)}; say --experts "
                "split"
            )
        split_ones = [e.source for e in detection.experts if not e.layout.startswith("fused")]
        if split_ones:
            raise LayoutError(
                f"{show_some(split_ones)}: is not fused in the source, and --experts fused keeps "
                "the form of the source; say --experts split"
            )
    return form


def runtime_warnings(
    detection: Detection,
    form: str,
    dialect: Dialect,
    runtimes: Sequence[str],
    formats: Sequence[str],
    part_blocks: Sequence[str],
) -> tuple[str, ...]:
    """What the user should know before relying on a runtime.

    ``runtimes``: those that load it.
    ``part_blocks``: linear layers that end in a part of a block.
    """
    family, model_type = detection.family, show(detection.model_type)
    found = []
    if not runtimes:
        found.append(
            f"no runtime is known to load {' and '.join(formats)} of model type {model_type} with "
            f"{form} experts in dialect {dialect.name}; try the result before you rely on it"
        )
    if family.released_as and set(family.runtimes) <= {TRANSFORMERS}:
        found.append(
            f"config.json names an architecture of transformers that vLLM and SGLang do not have; "
            f"releases of {model_type} name {' or '.join(family.released_as)}"
        )
    if family.instead and set(formats) != {UNQUANTIZED}:
        found.append(f"model type {model_type}: {family.instead}")
    if form == "split" and family.in_transformers and TRANSFORMERS not in family.runtimes:
        found.append(
            f"transformers reads the experts of {model_type} only fused: it would fill them with "
            "random numbers, and only log that keys are missing"
        )
    if part_blocks:
        found.append(
            f"{show_some(part_blocks)}: ends in part of a block, which transformers decodes "
            "wrongly where it decodes, as on a CPU"
        )
    return tuple(found)
