"""Write the output folder so that nothing in it looks finished before it is.

A shard is written under ``.moe-ckpt/``, where no loader looks, at planned offsets; then it is
flushed to disk, opened by the safetensors library, and renamed. Configuration follows the last
shard, config.json next to last and the index at the end. ``.moe-ckpt/written.json`` lists every
file that belongs to the conversion, before the first is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from .checkpoint import CONFIG, INDEX
from .errors import (
    EnvironmentFaultError,
    InputError,
    MoeCkptError,
    OutputRefusedError,
    show,
    show_some,
)
from .plan import OutShard, Plan, header_of, index_of
from .regular import read_regular
from .strict_json import parse_object

__all__ = ["OutputFolder", "ShardWriter", "check_out_dir"]

PRIVATE = ".moe-ckpt"
WRITTEN = "written.json"
_COPY_NBYTES = 4 << 20
_RECORD_CAP_NBYTES = 100_000_000


def check_out_dir(in_dir: Path, out_dir: Path, *, overwrite: bool) -> list[Path]:
    """Refuse an output folder that is not ours to write.

    Returns:
        Files of an earlier conversion that ``overwrite`` removes.

    Raises:
        OutputRefusedError: it overlaps the input, is no folder, or holds files.
    """
    if _overlap(in_dir, out_dir):
        raise OutputRefusedError(
            f"{show(out_dir)}: overlaps the input {show(in_dir)}; choose a folder outside it"
        )
    try:
        os.lstat(out_dir)
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise OutputRefusedError(
            f"{show(out_dir)}: {error.strerror}; choose another folder"
        ) from None
    if not out_dir.is_dir():
        raise OutputRefusedError(f"{show(out_dir)}: is not a folder; choose another")
    present = {
        path.relative_to(out_dir).as_posix()
        for path in out_dir.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    if not present:
        return []
    ours = _written_by_us(out_dir)
    foreign = sorted(present - ours)
    if foreign and ours:
        raise OutputRefusedError(
            f"{show(out_dir)}: holds files that moe-ckpt did not write: {show_some(foreign)}; move "
            "them away or choose another folder"
        )
    if foreign:
        raise OutputRefusedError(
            f"{show(out_dir)}: is not empty ({show_some(foreign)}); choose another folder"
        )
    if not overwrite:
        raise OutputRefusedError(
            f"{show(out_dir)}: holds an earlier conversion; pass --overwrite to replace it"
        )
    # What makes the folder loadable goes first, what makes it ours goes last.
    order = {CONFIG: -2, INDEX: -1, f"{PRIVATE}/{WRITTEN}": 1}
    return [out_dir / name for name in sorted(present, key=lambda name: (order.get(name, 0), name))]


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


def _written_by_us(out_dir: Path) -> set[str]:
    """Names that an earlier conversion listed as its own."""
    record = f"{PRIVATE}/{WRITTEN}"
    try:
        text = read_regular(out_dir / record, _RECORD_CAP_NBYTES, InputError)
        files = parse_object(text, record, InputError).get("files")
    except InputError:
        return set()
    listed = {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
    partial = {p.relative_to(out_dir).as_posix() for p in (out_dir / PRIVATE).glob("*.partial")}
    return {record} | listed | partial


class OutputFolder:
    """An output folder while a conversion writes it."""

    def __init__(self, plan: Plan, out_dir: Path, *, overwrite: bool) -> None:
        stale = check_out_dir(plan.root, out_dir, overwrite=overwrite)
        self.root = out_dir
        self._created = [p for p in (out_dir, *out_dir.parents) if not p.exists()]
        self._names = [shard.name for shard in plan.shards]
        self._names += [file.name for file in plan.side_files]
        self._names += [*plan.files, *([INDEX] if len(plan.shards) > 1 else [])]
        self._refuse_if_full(plan, stale)
        for path in stale:
            path.unlink()
        for folder in sorted({p.parent for p in stale} - {out_dir}, reverse=True):
            with suppress(OSError):
                folder.rmdir()
        record = {"tool": "moe-ckpt", "files": sorted(self._names)}
        try:
            (out_dir / PRIVATE).mkdir(parents=True, exist_ok=True)
            self.write_text(f"{PRIVATE}/{WRITTEN}", json.dumps(record, indent=1) + "\n")
        except BaseException:
            self.discard()
            raise

    def open_shard(self, shard: OutShard) -> ShardWriter:
        """Start a shard under a temporary name."""
        return ShardWriter(self.root, shard)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, complete or not at all."""
        partial = self._partial(name)
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, self.root / name)

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a side file, following links."""
        partial = self._partial(name)
        with source.open("rb") as read, partial.open("xb") as write:
            shutil.copyfileobj(read, write, _COPY_NBYTES)
            write.flush()
            os.fsync(write.fileno())
        _publish(partial, self.root / name)

    def finish(self, plan: Plan) -> None:
        """Write what makes the folder a checkpoint: configuration, and the index at the end."""
        for file in plan.side_files:
            self.copy_file(file.name, file.path)
        for name, text in plan.files.items():
            self.write_text(name, text)
        index = index_of(plan)
        if index is not None:
            self.write_text(INDEX, index)

    def discard(self) -> None:
        """Remove everything this conversion wrote, the folder too if it was not there before.

        The configuration goes first, so that an interrupted removal leaves nothing loadable.
        """
        for name in reversed(self._names):
            with suppress(OSError):
                (self.root / name).unlink()
        shutil.rmtree(self.root / PRIVATE, ignore_errors=True)
        folders = {p for name in self._names for p in (self.root / name).parents}
        inner = {p for p in folders if p.is_relative_to(self.root) and p != self.root}
        for folder in [*sorted(inner, reverse=True), *self._created]:
            with suppress(OSError):
                folder.rmdir()

    def _partial(self, name: str) -> Path:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]  # names may be long
        return self.root / PRIVATE / f"{digest}.partial"

    def _refuse_if_full(self, plan: Plan, stale: Iterable[Path]) -> None:
        target = Path(os.path.realpath(self.root))
        existing = next(path for path in (target, *target.parents) if path.exists())
        free = shutil.disk_usage(existing).free + sum(p.lstat().st_size for p in stale)
        if free < plan.write_nbytes:
            raise EnvironmentFaultError(
                f"{show(self.root)}: the output needs {plan.write_nbytes:,} bytes and the disk has "
                f"{free:,} free; nothing was written"
            )


class ShardWriter:
    """One output shard; several threads may write to it at once."""

    def __init__(self, root: Path, shard: OutShard) -> None:
        self._final = root / shard.name
        self._partial = root / PRIVATE / f"{shard.name}.partial"
        self._shard = shard
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._partial, flags, 0o666)
        try:
            _reserve(self._fd, shard.nbytes)
            header = header_of(shard.tensors)
            self._data_start = len(header)
            self.write(-len(header), memoryview(header))
        except OSError as error:
            os.close(self._fd)
            raise self._failed(error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset of the shard's data."""
        start = position = self._data_start + offset
        try:
            while data.nbytes:
                count = os.pwrite(self._fd, data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise self._failed(error) from error
        # On Linux this starts to write the pages to disk, which `finish` then waits for less.
        with suppress(OSError):
            os.posix_fadvise(self._fd, start, position - start, os.POSIX_FADV_DONTNEED)

    def finish(self) -> OutShard:
        """Flush to disk, let the safetensors library read the header, and rename."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._fd)
        with safe_open(self._partial, framework="np") as file:
            if len(file.keys()) != len(self._shard.tensors):
                raise MoeCkptError(f"{self._shard.name}: does not read back; please report this")
        _publish(self._partial, self._final)
        return self._shard

    def _failed(self, error: OSError) -> OSError:
        """The error with the name of the shard, which a file descriptor does not carry."""
        return OSError(error.errno, error.strerror, str(self._final))

    def abandon(self) -> None:
        """Close without publishing; `OutputFolder.discard` removes the file."""
        os.close(self._fd)


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, nbytes)


def _publish(partial: Path, final: Path) -> None:
    """Rename, and make the rename durable."""
    partial.replace(final)
    fd = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems
            raise
    finally:
        os.close(fd)
