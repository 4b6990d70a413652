"""Mend a quantized checkpoint without quantizing it again: what exact arithmetic can, and no more.

What `moe_ckpt.verify` finds is looked at once more here: each module of this room knows one fault
and adds to a `draft.Draft` what is to be changed. The plan that is made of it keeps every other
byte, and is carried out as a conversion is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..conversion import Progress, execute
from ..engines import backend_for
from ..limits import Limits
from ..output.out_dir import check_out_dir
from ..planning.options import File
from ..result import Result
from .draft import KINDS, Mend
from .mended_plan import Repair, make_repair

__all__ = ["KINDS", "Mend", "Repair", "carry_out", "make_repair", "repair"]


def repair(
    in_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    stats: Iterable[File] = (),
    partial: bool = False,
    limits: Limits | None = None,
    overwrite: bool = False,
    trust_journal: bool = False,
    hash_source: bool = False,
    progress: Progress | None = None,
) -> Result | None:
    """Write a mended copy of a quantized checkpoint, or go on with one that was interrupted.

    Args:
        in_dir: a folder with a quantized checkpoint, whoever made it.
        out_dir: a new or empty folder, or one with the same repair, finished or not.
        stats: activation statistics, for activation scales that are missing.
        partial: mend what can be mended, though something stays wrong.
        limits: threads and memory; they change no output byte.
        overwrite: remove an earlier output in ``out_dir`` and start anew.
        trust_journal: of finished shards compare only the size with the journal.
        hash_source: record the SHA-256 of each shard of the source, see `moe_ckpt.convert`.
        progress: called with the bytes read, and with a shard when it is finished.

    Returns:
        What was done; None if there was nothing to mend, and then nothing is written.

    Raises:
        InputError: the checkpoint cannot be read, or something cannot be mended.
        OutputRefusedError, EnvironmentFaultError, VerifyError: as `moe_ckpt.convert` does.
        UncheckedError: it is quantized in a way that is not read here.
    """
    check_out_dir(Path(in_dir), Path(out_dir), overwrite=overwrite)
    found = make_repair(in_dir, stats=stats)
    return carry_out(
        found,
        out_dir,
        partial=partial,
        limits=limits,
        overwrite=overwrite,
        trust_journal=trust_journal,
        hash_source=hash_source,
        progress=progress,
    )


def carry_out(
    found: Repair,
    out_dir: str | os.PathLike[str],
    *,
    partial: bool = False,
    limits: Limits | None = None,
    overwrite: bool = False,
    trust_journal: bool = False,
    hash_source: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Result | None:
    """Carry out a repair, or what is left of it; see `repair`."""
    if not partial or found.plan is None:
        found.refuse_what_is_left()
    if found.plan is None:
        return None
    return execute(
        found.plan,
        out_dir,
        backend=backend_for("cpu"),
        limits=limits,
        overwrite=overwrite,
        trust_journal=trust_journal,
        hash_source=hash_source,
        verify=not partial,
        progress=progress,
        say=say,
    )
