"""Whose files an output folder holds, and whether the disk takes what is to be written there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from ..dialects.config import CONFIG
from ..errors import EnvironmentFaultError, OutputRefusedError, show, show_some
from ..plan import Plan
from ..source.checkpoint import INDEX
from .journal import JOURNAL, PRIVATE, Journal, Record, read_journal
from .lock import LOCK, OWNER

__all__ = ["check_out_dir", "check_room", "files_in", "missing_nbytes", "remove_all"]

_OWN = frozenset({JOURNAL, f"{PRIVATE}/{LOCK}", f"{PRIVATE}/{OWNER}"})


def check_out_dir(in_dir: Path, out_dir: Path, *, overwrite: bool = False) -> Journal | None:
    """Refuse an output folder that is not ours to write.

    What is looked at needs no plan: a journal may turn out to be that of another conversion.

    Returns:
        The journal of the conversion that the folder holds, finished or not; None if it is empty
        or not there.

    Raises:
        OutputRefusedError: it overlaps the input, is no folder, or holds files of others.
    """
    if _overlap(in_dir, out_dir):
        raise OutputRefusedError(
            f"{show(out_dir)}: overlaps the input {show(in_dir)}; choose a folder outside it"
        )
    try:
        os.lstat(out_dir)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise OutputRefusedError(
            f"{show(out_dir)}: {error.strerror}; choose another folder"
        ) from None
    if not out_dir.is_dir():
        raise OutputRefusedError(f"{show(out_dir)}: is not a folder; choose another")
    journal = read_journal(out_dir)
    foreign = sorted(files_in(out_dir) - (journal.records.keys() if journal else set()))
    if foreign and not journal:
        raise OutputRefusedError(
            f"{show(out_dir)}: is not empty ({show_some(foreign)}); choose another folder"
        )
    if foreign and overwrite:
        raise foreign_files(out_dir, foreign)
    return journal


def foreign_files(out_dir: Path, names: Collection[str]) -> OutputRefusedError:
    """What to say of files that moe-ckpt did not write."""
    return OutputRefusedError(
        f"{show(out_dir)}: holds files that moe-ckpt did not write: {show_some(sorted(names))}; "
        "move them away or choose another folder"
    )


def files_in(out_dir: Path) -> set[str]:
    """Everything in a folder that is no folder, but for what a conversion keeps for itself."""
    found = {
        path.relative_to(out_dir).as_posix()
        for path in out_dir.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    partial = {name for name in found if name.startswith(f"{PRIVATE}/") and _is_partial(name)}
    return found - _OWN - partial


def remove_all(out_dir: Path, records: Mapping[str, Record]) -> None:
    """Remove a conversion: what makes the folder loadable goes first, the journal at the end."""
    first = [name for name in (CONFIG, INDEX) if name in records]
    for name in dict.fromkeys([*first, *records, *_partials(out_dir), JOURNAL]):
        (out_dir / name).unlink(missing_ok=True)
    remove_folders(out_dir, records)


def remove_partials(out_dir: Path) -> None:
    """Remove what an interrupted conversion was writing."""
    for name in _partials(out_dir):
        (out_dir / name).unlink(missing_ok=True)


def remove_folders(out_dir: Path, names: Collection[str]) -> None:
    """Remove the folders of these files where nothing else is in them."""
    folders = {parent for name in names for parent in Path(name).parents if parent.name}
    for folder in sorted(folders, reverse=True):
        try:
            (out_dir / folder).rmdir()
        except OSError:
            continue


def check_room(plan: Plan, out_dir: Path, finished: Mapping[str, Record], freed: int) -> None:
    """Refuse what the disk or the system's limits would stop in mid-run.

    ``freed``: bytes in the folder that are removed before anything is written.

    Raises:
        EnvironmentFaultError: too little is free, or a file would be larger than is allowed.
    """
    missing = missing_nbytes(plan, out_dir, finished) - freed
    if missing > 0:
        raise EnvironmentFaultError(
            f"{show(out_dir)}: the output needs {missing:,} bytes more than the disk has free; "
            "nothing was written"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(plan.shards, key=lambda shard: shard.nbytes)
    if limit not in (resource.RLIM_INFINITY, -1) and largest.nbytes > limit:
        raise EnvironmentFaultError(
            f"{show(largest.name)}: would have {largest.nbytes:,} bytes and this process may write "
            f"files of {limit:,} (ulimit -f); raise that or pass a smaller --max-shard-size; "
            "nothing was written"
        )


def missing_nbytes(plan: Plan, out_dir: Path, finished: Collection[str]) -> int:
    """Bytes still to be written, less those that are free where the folder is or will be."""
    target = Path(os.path.realpath(out_dir))
    existing = next(path for path in (target, *target.parents) if path.exists())
    need = plan.write_nbytes
    for shard in plan.shards:
        if shard.name in finished:
            need -= shard.nbytes
        if len(plan.shards) > 1:  # its lines of the index
            need += sum(len(t.name) + len(shard.name) + 12 for t in shard.tensors)
    return need - shutil.disk_usage(existing).free


def _partials(out_dir: Path) -> list[str]:
    return [f"{PRIVATE}/{path.name}" for path in (out_dir / PRIVATE).glob("*.partial")]


def _is_partial(name: str) -> bool:
    return name.endswith(".partial") and name.count("/") == 1


def _overlap(in_dir: Path, out_dir: Path) -> bool:
    """Whether one folder is in the other, or the output in a hub cache's files of the input.

    Folders are compared by device and inode as well: a bind mount has another path.
    """
    source, target = (Path(os.path.realpath(path)) for path in (in_dir, out_dir))
    # A hub cache keeps the files that its snapshots link to in a folder of this name.
    targets = (
        Path(os.path.realpath(p)) for p in (source.iterdir() if os.path.isdir(source) else ())
    )
    linked = {target.parent for target in targets if target.parent.name == "blobs"}

    def inside(path: Path, folder: Path) -> bool:
        return any(_same(parent, folder) for parent in (path, *path.parents))

    return inside(source, target) or any(inside(target, folder) for folder in {source, *linked})


def _same(one: Path, two: Path) -> bool:
    if one == two:
        return True
    try:
        return os.path.samefile(one, two)
    except OSError:
        return False
