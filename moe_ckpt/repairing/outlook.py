"""A mended checkpoint before it is written, as `verify` would see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..dialects.config import CONFIG, HF_QUANT_CONFIG
from ..dtypes import nbytes_of
from ..errors import CheckpointError
from ..plan import OutShard
from ..source.declared import everything_declared
from ..source.headers import TensorInfo
from ..source.strict_json import parse_object
from ..verify.config.modules import check_config
from ..verify.findings import Findings
from ..verify.inventory import inventory_of
from ..verify.structure.tensors import check_structure
from ..verify.subject import Subject, subject_of

__all__ = ["check_outlook", "outlook_of"]


def outlook_of(subject: Subject, shards: Sequence[OutShard], texts: Mapping[str, str]) -> Subject:
    """The checkpoint that these shards and configuration files make."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        offset = shard.header_nbytes
        for name, dtype, shape in shard.tensors:
            nbytes = nbytes_of(dtype, shape)
            tensors[name] = TensorInfo(name, dtype, shape, shard.name, offset, nbytes)
            offset += nbytes
    config: dict[str, Any] = parse_object(
        texts[CONFIG].encode(), CONFIG, CheckpointError, constants=True
    )
    beside = texts.get(HF_QUANT_CONFIG)
    said = everything_declared(config, None if beside is None else beside.encode())
    source = replace(subject.source, config=config, tensors=tensors)
    return subject_of(source, said, None, texts=texts, lost=subject.lost)


def check_outlook(outlook: Subject) -> Findings:
    """What `verify` will find but for the numbers, which are not there to be read."""
    findings = Findings()
    inventory = inventory_of(outlook)
    check_structure(outlook, inventory, findings)
    check_config(outlook, inventory, findings)
    return findings
