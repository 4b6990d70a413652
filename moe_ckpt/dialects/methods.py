"""The ``quant_method``s that are known: what they may describe, who reads that, and how.

Made of the tables of the dialects, and of the methods of others in `others`. From here sources
learn how quantized weights are stored, and verification what runtimes make of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..formats import find_format
from ..runtimes import TRANSFORMERS
from .compressed_tensors.read import describes, read_compressed, unread_schemes
from .compressed_tensors.table import SPELLINGS as OF_COMPRESSED_TENSORS
from .dialect import COMPRESSED_TENSORS, FP8, MODELOPT, Spelling
from .fp8.read import read_fp8, unread_mixes
from .fp8.table import CHANNEL, MXFP8, OTHER_SPELLINGS
from .fp8.table import SPELLINGS as OF_FP8
from .modelopt.read import foreign_algorithms, read_modelopt, unread_algorithms
from .modelopt.table import METHOD_NAMES
from .modelopt.table import SPELLINGS as OF_MODELOPT
from .others import GPT_OSS, read_fbgemm, read_mxfp4, read_mxfp8
from .reading import Reading

__all__ = ["METHODS", "QuantMethod"]


@dataclass(frozen=True, slots=True)
class QuantMethod:
    """What a configuration with one ``quant_method`` may describe, and how it is read.

    ``spellings``: the formats, and the tensors that they are stored in.
    ``read``: adds what runtimes make of a configuration to a `Reading`.
    ``names``: what runtimes know it by, where that is more than its name.
    ``why_not``: why a runtime reads no format so.
    ``has_plain_head``: whether runtimes build the output head, and some families' routers, in 16
        bits even if they are not listed.
    ``source_problems``: what a configuration says of ways to quantize that no source is read of.
    ``unread``: what it says of ways that runtimes know, and nothing here reads.
    ``describes``: whether a configuration can mean a format of the method.
    """

    name: str
    spellings: Sequence[Spelling]
    read: Callable[[Mapping[str, Any], Reading], None]
    names: Sequence[str] = ()
    why_not: Mapping[str, str] = field(default_factory=dict)
    has_plain_head: bool = False
    source_problems: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _said: ()
    unread: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _said: ()
    describes: Callable[[Mapping[str, Any], str], bool] = lambda _said, _format: True

    def spelling_of(self, format_name: str) -> Spelling | None:
        """How a format is spelled; None if it is not."""
        return next((row for row in self.spellings if row.format == format_name), None)

    def may_be(self, format_name: str, said: Mapping[str, Any]) -> bool:
        """Whether weights of a source that says this may be of a format."""
        weights = find_format(format_name).weights
        sources = (find_format(row.format).weights for row in self.spellings if row.is_source)
        return weights in sources and self.describes(said, format_name)


_METHODS: tuple[QuantMethod, ...] = (
    QuantMethod(
        FP8,
        (*OF_FP8, *OTHER_SPELLINGS),
        read_fp8,
        has_plain_head=True,
        source_problems=unread_mixes,
        unread=unread_mixes,
    ),
    QuantMethod("fbgemm_fp8", [CHANNEL], read_fbgemm, has_plain_head=True),
    QuantMethod("mxfp8", [MXFP8], read_mxfp8, has_plain_head=True),
    QuantMethod("mxfp4", [GPT_OSS], read_mxfp4),
    QuantMethod(
        MODELOPT,
        OF_MODELOPT,
        read_modelopt,
        names=METHOD_NAMES,
        why_not={
            TRANSFORMERS: "it knows no quant_method modelopt: it warns, and takes the codes "
            "for weights"
        },
        source_problems=unread_algorithms,
        unread=foreign_algorithms,
    ),
    QuantMethod(
        COMPRESSED_TENSORS,
        OF_COMPRESSED_TENSORS,
        read_compressed,
        source_problems=unread_schemes,
        unread=unread_schemes,
        describes=describes,
    ),
)

METHODS: Mapping[str, QuantMethod] = {method.name: method for method in _METHODS}
