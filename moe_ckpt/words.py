"""Numbers with their nouns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

__all__ = ["count_of", "counted"]


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "shard"), count_of(2000, "tensor")
    ('1 shard', '2,000 tensors')
    """
    plural = "matrices" if noun == "matrix" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def counted(numbers: Mapping[str, int]) -> Iterator[str]:
    """What there is some of, in words: nouns in the plural -> how many.

    >>> list(counted({"shards": 1, "matrices in nvfp4": 1, "copied tensors compared": 2000}))
    ['1 shard', '1 matrix in nvfp4', '2,000 copied tensors compared']
    """
    for noun, number in numbers.items():
        one = re.sub(r"s(?= |$)", "", noun.replace("matrices", "matrix"), count=1)
        if number:
            yield f"{number:,} {one if number == 1 else noun}"
