"""Layers for multi-token prediction that lie in shards which the index does not name."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CheckpointError, show_some
from ..source.checkpoint import Source
from ..source.headers import read_header
from .missing import stacks_of
from .roles import is_multi_token
from .sizes import num_hidden_layers

__all__ = ["with_mtp_shards"]


def with_mtp_shards(source: Source) -> Source:
    """The source with the shards beside its index that hold such layers, and nothing else.

    Raises:
        CheckpointError: a shard holds such layers and other tensors; which of them count, cannot be
            told.
        LayoutError: config.json says something that is no number of layers.
    """
    if not source.strays:
        return source
    num_layers = num_hidden_layers(source.config)
    stacks = stacks_of(source.tensors)
    shards, tensors = dict(source.shards), dict(source.tensors)
    for name in source.strays:
        try:
            shard, infos = read_header(source.root / name)
        except CheckpointError:
            continue  # it is left out, whatever it is
        new = [info for info in infos if info.name not in tensors]
        of_mtp = [info.name for info in new if is_multi_token(info.name, stacks, num_layers)]
        if len(of_mtp) == len(infos) and infos:
            shards[name] = shard
            tensors |= {info.name: info for info in infos}
        elif of_mtp:
            raise CheckpointError(
                f"{name}: holds layers for multi-token prediction ({show_some(of_mtp)}) and other "
                "tensors, and the index does not name it; name those that count in the index, or "
                "move the file away"
            )
    taken = tuple(name for name in source.strays if name in shards)
    if not taken:
        return source
    note = f"carried over, though the index does not name it: {show_some(taken)}"
    return replace(
        source,
        shards=shards,
        tensors=tensors,
        strays=tuple(name for name in source.strays if name not in taken),
        left_out=tuple(name for name in source.left_out if name not in taken),
        warnings=(*source.warnings, note),
    )
