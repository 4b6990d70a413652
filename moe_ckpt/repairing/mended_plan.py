"""Decide what of a checkpoint is mended, and how: a plan, or what stands in its way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..dialects.config import CONFIG, HF_QUANT_CONFIG
from ..dialects.plain import DIALECT as PLAIN
from ..errors import CheckpointError, InputError, Problems, UncheckedError, show
from ..formats import UNQUANTIZED
from ..layouts.sizes import model_type_of
from ..plan import OutShard, Plan
from ..planning.calibration import Calibration
from ..planning.options import File, Options
from ..planning.provenance import origin_of
from ..planning.stats import read_stats
from ..source.checkpoint import INDEX, RECIPE_FILE, shards_in, side_files_of
from ..source.files import read_regular
from ..texts import index_of
from ..verify import check_parts
from ..verify.findings import ERROR, Finding, Findings
from ..verify.inventory import inventory_of
from ..verify.subject import Subject, open_subject
from ..words import count_of
from .activation_scales import give_activation_scales
from .configuration import dialect_of, written_from_tensors
from .draft import Draft, Mend, draft_of
from .dtypes_held import hold_scales_as_bytes
from .mended_shards import mended_shards
from .outlook import check_outlook, outlook_of
from .reciprocals import invert_reciprocals
from .unequal import share_global_scales

__all__ = ["Repair", "make_repair"]

_CAP_NBYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Repair:
    """What is mended, and what is not.

    ``plan`` is None if there is nothing to mend. ``left``: what stays wrong.
    """

    root: Path
    mends: tuple[Mend, ...]
    left: tuple[str, ...]
    plan: Plan | None

    def refuse_what_is_left(self) -> None:
        """Raise if something stays wrong.

        Raises:
            CheckpointError: naming all of it.
        """
        if not self.left:
            return
        what = count_of(len(self.left), "problem")
        advice = (
            f"{what} cannot be mended; --partial mends the rest"
            if self.mends
            else f"{what}, and nothing that can be mended"
        )
        problems = Problems()
        for text in self.left:
            problems.add(CheckpointError, text)
        problems.add(
            CheckpointError,
            f"{show(self.root)}: {advice}; start from the original release, or download it again",
        )
        problems.check()


def make_repair(in_dir: str | os.PathLike[str], *, stats: Iterable[File] = ()) -> Repair:
    """Find what can be mended in a checkpoint; reads its scales, and writes nothing.

    Args:
        in_dir: a folder with a quantized checkpoint.
        stats: files of activation statistics, for activation scales that are missing.

    Raises:
        InputError: the checkpoint or the statistics cannot be read.
        UncheckedError: it is quantized in a way that is not read here.
    """
    asked = Options(stats=stats)
    findings = Findings()
    subject = open_subject(in_dir, findings)
    opened = list(findings.found)
    texts = _texts_of(subject)
    if CONFIG not in texts or not subject.source.tensors:
        found = [f"{f.where}: {f.problem}" for f in opened if f.grade == ERROR]
        raise CheckpointError(*(found or [f"{CONFIG}: is empty; take that of the release"]))
    if subject.unread:
        where, reason = subject.unread[0]
        raise UncheckedError(f"{show(where)}: {reason}, so that nothing can be mended")
    check_parts(subject, findings)
    draft = draft_of(subject, inventory_of(subject))
    invert_reciprocals(draft)
    share_global_scales(draft)
    give_activation_scales(draft, _calibration(subject, asked))
    hold_scales_as_bytes(draft)
    shards = mended_shards(draft)
    damaged = next((f.problem for f in opened if f.where == HF_QUANT_CONFIG), "")
    outlook, left = _configured(draft, shards, texts, damaged)
    strays = shards_in(subject.root) - subject.source.shards.keys()
    left += [f for f in opened if not _is_mended_by_writing(f, strays)]
    mended, told = {show(name) for name in draft.mended}, {show(name) for name in draft.problems}
    left += [f for f in findings.found if f.part == "scales" and f.where not in mended]
    plan = _plan(subject, outlook, shards, asked)
    _tell_index(draft, plan)
    problems = [
        f"{found.where}: {found.problem}; {found.effect}"
        for found in left
        if found.grade == ERROR and found.where not in told
    ]
    problems += [f"{show(name)}: {problem}" for name, problem in draft.problems.items()]
    return Repair(
        root=subject.root,
        mends=tuple(draft.mends),
        left=tuple(dict.fromkeys(problems)),
        plan=plan if draft.mends else None,
    )


def _texts_of(subject: Subject) -> dict[str, str]:
    """The configuration files that can be read, as they are; config.json is the last."""
    texts = {}
    for name in (RECIPE_FILE, HF_QUANT_CONFIG, CONFIG):
        path = subject.root / name
        if os.path.lexists(path):
            try:
                texts[name] = read_regular(path, _CAP_NBYTES, CheckpointError).decode()
            except (InputError, UnicodeDecodeError):
                continue
    if not subject.config:
        texts.pop(CONFIG, None)
    return texts


def _calibration(subject: Subject, asked: Options) -> Calibration | None:
    if not asked.stats_files:
        return None
    if subject.detection is None:
        raise CheckpointError(*subject.undetected)
    return Calibration(read_stats(asked.stats_files), subject.detection, missing_is_constant=True)


def _is_mended_by_writing(found: Finding, strays: Set[str]) -> bool:
    """Whether a finding of opening a checkpoint is about what is written anew.

    ``strays``: shards that the index does not name.
    """
    is_index = found.where == INDEX or (found.where in strays and "does not name" in found.problem)
    return is_index or found.where == HF_QUANT_CONFIG


def _configured(
    draft: Draft, shards: Sequence[OutShard], texts: Mapping[str, str], damaged: str
) -> tuple[Subject, list[Finding]]:
    """The outlook with its configuration, written anew if it is wrong; and what is left wrong.

    ``damaged``: what is wrong with hf_quant_config.json as a file.
    """
    if damaged:
        texts = {name: text for name, text in texts.items() if name != HF_QUANT_CONFIG}
    outlook = outlook_of(draft.subject, shards, texts)
    found = check_outlook(outlook).found
    wrong = [f"{f.where}: {f.problem}" for f in found if f.part == "config" and f.grade == ERROR]
    wrong += [f"{HF_QUANT_CONFIG}: {damaged}"] if damaged else []
    if not wrong:
        return outlook, found
    try:
        written = written_from_tensors(outlook)
    except InputError as error:
        why = Finding("config", CONFIG, "cannot be written from the tensors", error.problems[0])
        return outlook, [*found, why]
    kept = {name: text for name, text in texts.items() if name == RECIPE_FILE}
    outlook = outlook_of(draft.subject, shards, {**kept, **written.files})
    after = check_outlook(outlook).found
    for name, text in written.files.items():
        if text != texts.get(name):
            draft.mends.append(Mend("config", name, f"is written anew, for {wrong[0]}"))
    return outlook, after


def _plan(subject: Subject, outlook: Subject, shards: tuple[OutShard, ...], asked: Options) -> Plan:
    """The plan that writes these shards."""
    detection = outlook.detection
    experts = detection.experts if detection else ()
    dialect = dialect_of(outlook) or PLAIN
    formats: dict[str, int] = {}
    for module in inventory_of(outlook).quantized:
        formats[module.format] = formats.get(module.format, 0) + (
            module.shape[0] if len(module.shape) == 3 else 1
        )
    source = replace(
        subject.source,
        side_files=side_files_of(subject.root, set(subject.source.shards)),
    )
    return Plan(
        root=subject.root,
        model_type=model_type_of(subject.config),
        family=detection.family.name if detection else "",
        verdicts=(),
        formats=formats or {UNQUANTIZED: 0},
        dialect=dialect.name,
        experts_as="split" if any(e.layout == "split" for e in experts) else "fused",
        source_shards=tuple(subject.source.shards.values()),
        source_nbytes=sum(info.nbytes for info in subject.source.tensors.values()),
        num_parameters=sum(prod(info.shape) for info in outlook.weights.tensors.values()),
        experts=experts,
        shards=shards,
        files=outlook.texts,
        side_files=source.side_files,
        left_out=tuple(sorted(shards_in(subject.root) - subject.source.shards.keys())),
        stats_files=asked.stats_files,
        stats_covered=0,
        notes=(),
        warnings_by_kind={},
        origin=replace(origin_of(asked, source), options={"--repair": "yes"}),
    )


def _tell_index(draft: Draft, plan: Plan) -> None:
    """Note an index that is wrong about the source; the output has one that is right."""
    subject = draft.subject
    named = {info.name: info.shard for info in subject.source.tensors.values()}
    index = subject.index
    if index is None:
        if len(subject.source.shards) > 1:
            draft.mends.append(Mend("index", INDEX, "is written; there is none"))
        return
    metadata, weight_map = index.get("metadata"), index.get("weight_map")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    nbytes = sum(info.nbytes for info in subject.source.tensors.values())
    said = []
    if weight_map != named:
        said.append("names every tensor in its shard")
    if not isinstance(metadata, dict):
        said.append("gets its metadata")
    if total is not None and total != nbytes:
        said.append(f"total_size becomes {plan.tensors_nbytes}")
    if said:
        text = "; ".join(said)
        what = text if index_of(plan) else "is left out: with one shard there is none"
        draft.mends.append(Mend("index", INDEX, what))
