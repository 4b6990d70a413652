"""Opening a checkpoint as what its makers would release."""

from __future__ import annotations

import os

from ..source.checkpoint import open_source
from .strays import with_mtp_shards
from .unwrapping import Unwrapped, unwrap

__all__ = ["open_released"]


def open_released(folder: str | os.PathLike[str]) -> Unwrapped:
    """A checkpoint with all shards that count, under the names of a release.

    Raises:
        InputError: it is damaged, or what counts of it, or the names, are not certain.
        OSError: the machine failed to read it.
    """
    return unwrap(with_mtp_shards(open_source(folder)))
