"""What a plan was made from: the source, the options, other files, and the version of moe-ckpt.

A conversion that is taken up again must agree in all of it, or shards of two kinds would stand
side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Origin", "differences"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What decides the bytes of an output, beside the source's own bytes.

    ``headers``: digest over the source's files, their sizes and the headers of shards; ``config``:
    over its config.json; ``mtimes``: over the modification times of its shards and side files.
    ``options``: those that decide a byte. ``files``: option -> SHA-256 of the files given with it.
    """

    version: str
    headers: str
    config: str
    mtimes: str
    options: Mapping[str, str]
    files: Mapping[str, tuple[str, ...]]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self)
        found["files"] = {option: list(digests) for option, digests in self.files.items()}
        return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, of_mtimes: str = ""
) -> Iterator[str]:
    """What differs between two origins as JSON has them, in words.

    ``of_mtimes`` is added where modification times do.
    """
    if before["version"] != now["version"]:
        yield f"moe-ckpt {before['version']} began it, this is {now['version']}"
    if before["headers"] != now["headers"]:
        yield "the source has other files, sizes or headers"
    elif before["config"] != now["config"]:
        yield "the source's config.json says other things"
    elif before["mtimes"] != now["mtimes"]:
        yield f"files of the source were written since{of_mtimes}"
    for option, value in now["options"].items():
        was = before["options"].get(option)
        if was != value:
            yield f"{option} was {was or 'not given'} and is {value or 'not given'} now"
    for option, digests in now["files"].items():
        was = before["files"].get(option)
        if was and digests and was != digests:
            yield f"{option} has another content"
        elif was != digests:
            yield f"{option} {'was given before' if was else 'is given now'} only"
