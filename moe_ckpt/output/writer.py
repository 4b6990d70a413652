"""Write the output folder so that nothing in it looks finished before it is.

Every file goes the same way: it is written under ``.moe-ckpt/``, where no runtime looks, and
flushed to disk; the journal gets a line with its SHA-256; then it is renamed. Shards come first.
Configuration follows the last of them, config.json next to last and the index at the end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import numpy as np
from safetensors import safe_open

from ..errors import MoeCkptError, OutputRefusedError, show
from ..plan import OutShard, Plan
from ..source.checkpoint import pieces_of
from ..texts import header_of
from .durable import publish, sync_folder, write_new
from .journal import JOURNAL, PRIVATE, Head, JournalWriter, Record, read_journal
from .lock import locked
from .out_dir import check_room, remove_all, remove_folders, remove_partials
from .resume import check_resumable, finished_files, is_as_recorded, output_names

__all__ = ["OutputFolder", "ShardWriter", "output_folder"]

_COPY_NBYTES = 4 << 20


class StoppedError(Exception):
    """A shard that was being finished is given up, for the conversion ends."""


@contextmanager
def output_folder(
    plan: Plan,
    out_dir: Path,
    head: Head,
    *,
    overwrite: bool = False,
    trust_journal: bool = False,
    threads: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[OutputFolder]:
    """Hold an output folder for a conversion: a new one, or one that was interrupted.

    What is finished stays if the conversion ends early; if nothing is, the folder is removed.

    Raises:
        OutputRefusedError: it is not ours to write, or of another conversion.
        EnvironmentFaultError: the disk has no room.
    """
    journal = check_resumable(plan, out_dir, head, overwrite=overwrite)
    records = journal.records if journal else {}
    if journal and not overwrite:
        check_room(plan, out_dir, records, 0)
    else:
        old = [path for path in map(out_dir.joinpath, records) if os.path.lexists(path)]
        freed = sum(path.lstat().st_size for path in old)
        check_room(plan, out_dir, {}, freed)
    created = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    private = out_dir / PRIVATE
    private.mkdir(parents=True, exist_ok=True)
    for path in created:
        sync_folder(path.parent)
    try:
        with locked(private):
            # What was seen before may be what another run did meanwhile.
            journal = check_resumable(plan, out_dir, head, overwrite=overwrite)
            finished: dict[str, Record] = {}
            if journal and overwrite:
                remove_all(out_dir, journal.records)
            elif journal:
                finished = finished_files(
                    plan, journal, out_dir, trust_journal=trust_journal, threads=threads, say=say
                )
                for name in [name for name in journal.records if name not in finished][::-1]:
                    (out_dir / name).unlink(missing_ok=True)
            remove_partials(out_dir)
            folder = OutputFolder(plan, out_dir, head, finished)
            try:
                yield folder
            except BaseException:
                folder.leave()
                stay = len(folder.finished.keys() & {shard.name for shard in plan.shards})
                if stay:
                    say(f"{stay} of {len(plan.shards)} shards are finished and stay")
                raise
    finally:
        if not (out_dir / JOURNAL).exists():
            for path in (private, *created):
                with suppress(OSError):
                    path.rmdir()


class OutputFolder:
    """An output folder while a conversion writes it.

    ``finished``: the files that are recorded. ``resumed``: the shards among them that an earlier
    run made. ``stop`` is set to give up what takes long.
    """

    def __init__(self, plan: Plan, out_dir: Path, head: Head, finished: dict[str, Record]) -> None:
        self.root = out_dir
        self.stop = Event()
        self._plan = plan
        self._order = output_names(plan)
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.is_complete = len(finished) == len(self._order)
        self.resumed = frozenset(shard.name for shard in plan.shards) & finished.keys()
        self.finished = finished
        if not self.is_complete:
            self._journal = JournalWriter(out_dir, self._token, head, finished)

    @property
    def inexact_blocks(self) -> int:
        """Blocks of MXFP4 in all finished shards that NVFP4 could not hold exactly."""
        return sum(record.inexact_blocks for record in self.finished.values())

    def open_shard(self, shard: OutShard) -> ShardWriter:
        """Start a shard under a temporary name."""
        self._journal.check()
        return ShardWriter(shard, self._partial(shard.name), self.root / shard.name)

    def publish_shard(self, out: ShardWriter, inexact_blocks: int = 0) -> OutShard:
        """Flush a shard to disk, record it, and give it its name."""
        self._journal.check()
        digest = out.finish(self.stop)
        self._publish(out.partial, Record(out.shard.name, out.shard.nbytes, digest, inexact_blocks))
        return out.shard

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write what makes the folder a checkpoint: side files, and ``texts`` in their order.

        ``texts``: name -> text of the configuration files, and of the index at the end.
        """
        for file in self._plan.side_files:
            if file.name not in self.finished:
                self._write(file.name, pieces_of(self._plan.root, file))
        for name, text in texts.items():
            if name not in self.finished:
                self._write(name, [text.encode()])

    def leave(self) -> None:
        """Remove what is not finished; the journal too if nothing is."""
        with suppress(OSError):
            remove_partials(self.root)
        if not self.finished and not self._is_anothers():
            with suppress(OSError):
                (self.root / JOURNAL).unlink(missing_ok=True)
            remove_folders(self.root, self._order)
        elif self.finished:
            with suppress(OSError):
                self._journal.restore()

    def _is_anothers(self) -> bool:
        """Whether another run, which no lock kept out, has finished files here."""
        try:
            journal = read_journal(self.root)
        except OutputRefusedError:
            return False
        return journal is not None and any(os.path.lexists(self.root / n) for n in journal.records)

    def _write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file that is not a shard, complete or not at all."""
        path = self._partial(name)
        nbytes, digest = write_new(path, pieces)
        self._publish(path, Record(name, nbytes, digest))

    def _publish(self, path: Path, record: Record) -> None:
        final = self.root / record.file
        self._make_folder(final)
        if os.path.lexists(final) and not is_as_recorded(final, record):
            raise self._taken(record.file)
        self._journal.add(record)
        if record.file == self._order[-1]:  # the same journal, however often it was interrupted
            self._journal.settle(self._order)
        try:
            publish(path, final)
        except FileExistsError:
            if not is_as_recorded(final, record):
                self._journal.take_back(record.file)
                raise self._taken(record.file) from None
            sync_folder(final.parent)  # another run wrote the same
            path.unlink(missing_ok=True)

    def _make_folder(self, final: Path) -> None:
        """Make the folders of a file of the output, which may not lead elsewhere."""
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self._taken(final.parent.relative_to(self.root).as_posix()) from None
        for folder in final.relative_to(self.root).parents:
            if folder.name and (self.root / folder).is_symlink():
                raise self._taken(folder.as_posix())

    def _taken(self, name: str) -> OutputRefusedError:
        return OutputRefusedError(
            f"{show(self.root)}: {show(name)} was put there while the conversion ran, and is not "
            "replaced; move it away and run the same command again"
        )

    def _partial(self, name: str) -> Path:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]  # names may be long
        return self.root / PRIVATE / f"{digest}.{self._token}.partial"


class ShardWriter:
    """One output shard; several threads may write to it at once."""

    def __init__(self, shard: OutShard, partial: Path, final: Path) -> None:
        self.shard = shard
        self.partial = partial
        self._final = final
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(partial, flags, 0o666)
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

    def finish(self, stop: Event) -> str:
        """Flush to disk and let the safetensors library read the header; returns the SHA-256."""
        try:
            digest = self._sha256(stop)
            os.fsync(self._fd)
            with suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(self._fd)
        with safe_open(self.partial, framework="np") as file:
            if len(file.keys()) != len(self.shard.tensors):
                raise MoeCkptError(f"{self.shard.name}: does not read back; please report this")
        return digest

    def abandon(self) -> None:
        """Close without publishing; `OutputFolder.leave` removes the file."""
        os.close(self._fd)

    def _sha256(self, stop: Event) -> str:
        """The digest of the bytes as the system gives them back."""
        state, position = hashlib.sha256(), 0
        buffer = np.empty(_COPY_NBYTES, np.uint8).data
        while position < self.shard.nbytes:
            if stop.is_set():
                raise StoppedError
            count = os.preadv(self._fd, [buffer], position)
            state.update(buffer[:count])
            position += count
            if not count:
                raise OSError(errno.EIO, "was cut short while it was written")
        return state.hexdigest()

    def _failed(self, error: OSError) -> OSError:
        """The error with the name of the shard, which a file descriptor does not carry."""
        return OSError(error.errno, error.strerror, str(self._final))


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, nbytes)
