"""How far a conversion is, for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

from tqdm import tqdm

from ..plan import OutShard, Plan
from ..report.text import size

__all__ = ["Progress"]


class Progress:
    """A bar in bytes on a terminal, a line for each shard elsewhere."""

    def __init__(
        self, plan: Plan, say: Callable[[Iterable[str]], None], *, quiet: bool = False
    ) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._say = say
        self._lines = not terminal and not quiet
        self._numbers = {shard.name: number for number, shard in enumerate(plan.shards, 1)}
        tqdm.monitor_interval = 0  # no thread that watches over the bar
        self._bar = tqdm(
            total=plan.read_nbytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            desc="converting",
            disable=quiet or not terminal,
        )

    def __enter__(self) -> Callable[[int, OutShard | None], None]:
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _report(self, nbytes: int, shard: OutShard | None) -> None:
        with suppress(OSError):  # a terminal that has gone away
            self._bar.update(nbytes)
        if shard is not None and self._lines:
            which = f"shard {self._numbers[shard.name]} of {len(self._numbers)}"
            self._say([f"{which}: {shard.name}, {size(shard.nbytes)}"])
