"""What of an interrupted conversion stays, and whether it was this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..dialects.config import CONFIG
from ..errors import OutputRefusedError, show, show_some
from ..origin import differences
from ..plan import Plan
from ..source.checkpoint import INDEX
from ..source.files import file_sha256
from ..texts import header_of, index_of
from .journal import Head, Journal, Record, head_of
from .out_dir import check_out_dir, files_in, foreign_files

__all__ = ["check_resumable", "finished_files", "is_as_recorded", "output_names"]


def output_names(plan: Plan) -> list[str]:
    """Every file of the output, in the order in which it is written."""
    names = [shard.name for shard in plan.shards]
    names += [file.name for file in plan.side_files]
    return [*names, *plan.files, *([INDEX] if len(plan.shards) > 1 else [])]


def check_resumable(
    plan: Plan, out_dir: Path, head: Head | None = None, *, overwrite: bool = False
) -> Journal | None:
    """Refuse an output folder that a conversion could not write to, or go on with.

    ``head`` is that of the conversion; it is made of the plan if it is needed and None.

    Returns:
        The journal of the conversion that the folder holds, if it holds one.

    Raises:
        OutputRefusedError: it is not ours to write, or of another conversion.
    """
    journal = check_out_dir(plan.root, out_dir, overwrite=overwrite)
    if journal and not overwrite:
        _refuse_other(journal.head, head or head_of(plan), out_dir)
    return journal


def _refuse_other(before: Head, now: Head, out_dir: Path) -> None:
    """Refuse to go on with a conversion that is not this one.

    Raises:
        OutputRefusedError: naming everything that differs.
    """
    was, is_now = dict(before.origin), dict(now.origin)
    hint = ""
    if before.content and now.content:
        was["mtimes"] = is_now["mtimes"]  # contents count instead
    elif before.content:
        hint = " (--hash-source compares their contents)"
    found = list(differences(was, is_now, of_mtimes=hint))
    if before.content and now.content and before.content != now.content:
        other = [n for n, digest in now.content.items() if before.content.get(n) != digest]
        found.append(f"files of the source have other contents: {show_some(other)}")
    if not found and before.plan != now.plan:
        found.append("the plan is another")
    if found:
        raise OutputRefusedError(
            f"{show(out_dir)}: holds a conversion that was begun otherwise: {'; '.join(found)}. Go "
            "on as it was begun, choose another folder, or pass --overwrite to start anew"
        )


def finished_files(
    plan: Plan,
    journal: Journal,
    out_dir: Path,
    *,
    trust_journal: bool,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Record]:
    """The files of an interrupted conversion that need not be made again.

    Shards that are damaged are left out, and then what makes the folder loadable is as well; both
    are to be removed.

    Args:
        plan: of the same conversion.
        journal: of the folder.
        out_dir: the folder.
        trust_journal: take shards of the right size for what they were.
        threads: how many files to read at once.
        say: called with a line on what is found.

    Raises:
        OutputRefusedError: the folder holds files of others, or a small file was edited.
    """
    shards = {shard.name: shard for shard in plan.shards}
    order = output_names(plan)
    present = files_in(out_dir)
    foreign = {n for n in present - journal.records.keys() if not _is_planned(plan, n, out_dir / n)}
    foreign |= (journal.records.keys() - set(order)) & present
    if foreign:
        raise foreign_files(out_dir, foreign)
    recorded = [name for name in order if name in journal.records]
    there = [name for name in recorded if os.path.lexists(out_dir / name)]
    trusted = shards.keys() if trust_journal else ()
    count = sum(name in shards for name in there)
    if count and not trust_journal:
        say(f"comparing finished shards with the journal: {count} (--trust-journal skips this)")
    is_sound = partial(_is_sound, out_dir, journal.records, trusted)
    with ThreadPoolExecutor(threads) as pool:
        sound = {
            name for name, right in zip(there, pool.map(is_sound, there), strict=True) if right
        }
    edited = [name for name in there if name not in sound and name not in shards]
    if edited:
        raise OutputRefusedError(
            f"{show(out_dir)}: {show_some(edited)} was changed since it was written; move it away, "
            "or pass --overwrite to start anew"
        )
    damaged = [name for name in recorded if name in shards and name not in sound]
    if damaged:
        say(f"not what they were, and made again: {show_some(damaged)}")
    if not sound.issuperset(shards):
        sound -= {CONFIG, INDEX}
    return {name: journal.records[name] for name in recorded if name in sound}


def _is_sound(
    out_dir: Path, records: Mapping[str, Record], trusted: Collection[str], name: str
) -> bool:
    return is_as_recorded(out_dir / name, records[name], trusts_size=name in trusted)


def is_as_recorded(path: Path, record: Record, *, trusts_size: bool = False) -> bool:
    """Whether a file is still the one that was recorded."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.nbytes:
        return False
    return trusts_size or file_sha256(path) == record.sha256


def _is_planned(plan: Plan, name: str, path: Path) -> bool:
    """Whether a file that no record speaks of is what the plan would write all the same.

    Two runs at once lose records where a file system forgets locks.
    """
    if path.is_symlink() or not path.is_file():
        return False
    shard = next((shard for shard in plan.shards if shard.name == name), None)
    if shard is not None:
        header = header_of(shard.tensors)
        with path.open("rb") as file:
            return path.stat().st_size == shard.nbytes and file.read(len(header)) == header
    side = next((file for file in plan.side_files if file.name == name), None)
    if side is not None:
        return path.stat().st_size == side.nbytes and file_sha256(path) == file_sha256(side.path)
    text = index_of(plan) if name == INDEX else plan.files.get(name)
    return text is not None and path.read_bytes() == text.encode()
