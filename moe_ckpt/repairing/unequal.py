"""Matrices that runtimes build as one, and whose NVFP4 global scales differ.

All get the largest one, under which none is clipped; `formats.nvfp4_rescaled` says what becomes of
the block scales of the others. Whether E4M3 can hold those is known from the block scales alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..dialects.matching import built_modules
from ..formats.nvfp4_rescaled import exact_scales
from ..source.stored import Read
from ..verify.inventory import Inventory, Module, pairs_of
from ..work.reader import SourceReader
from .draft import Draft, Mend, Shared, is_nvfp4

__all__ = ["share_global_scales"]


def share_global_scales(draft: Draft) -> None:
    """Bring matrices under one global scale; reads the block scales of those that change."""
    reader = SourceReader(draft.subject.source.shards.values())
    try:
        for modules in _built_as_one(draft.inventory):
            if len(modules) > 1 and all(map(is_nvfp4, modules)):
                _share(draft, modules, reader)
        reader.check_unchanged()
    finally:
        reader.close()


def _built_as_one(inventory: Inventory) -> Iterator[Sequence[Module]]:
    """Gate and up of each expert, and the linear layers that are parts of one."""
    for experts in inventory.experts.values():
        for pair in pairs_of(experts.projections):
            for matrices in experts.split.values():
                yield [matrices[name] for name in pair if name in matrices]
    linears = inventory.linears
    quantized = [name for name, module in linears.items() if module.is_quantized]
    for members in built_modules(quantized).values():
        yield [linears[name] for name in members]


def _share(draft: Draft, modules: Sequence[Module], reader: SourceReader) -> None:
    stored = [draft.stored(module, "global_scale") for module in modules]
    numbers = [number for number in stored if number is not None]
    if len(numbers) < len(stored) or len(set(numbers)) == 1:
        return
    is_inverse = "global_scale" in modules[0].inverse
    infos = [info for module in modules if (info := module.tensor("global_scale")) is not None]
    alike = {(module.inverse, module.shape[1]) for module in modules}
    inverted = {info.name in draft.numbers for info in infos}
    if len(alike) > 1 or len(inverted) > 1:
        draft.problems[infos[-1].name] = (
            "differs from those that it must equal, and they are not stored alike"
        )
        return
    shared = min(numbers) if is_inverse else max(numbers)
    blocks = [_rounded(module, number, shared, is_inverse, reader)
              for module, number in zip(modules, numbers, strict=True)]  # fmt: skip
    source_inverse = is_inverse != inverted.pop()
    draft.shared.append(Shared(tuple(modules), source_inverse))
    for module, info, number, lost in zip(modules, infos, numbers, blocks, strict=True):
        draft.mended.add(info.name)
        if number == shared:
            continue
        draft.put(info, shared)
        total = module.shape[0] * module.shape[1] // 16
        what = f"{number:.9g} becomes {shared:.9g}"
        what += f", and {lost:,} of {total:,} blocks are rounded" if lost else ""
        draft.mends.append(Mend("rounded" if lost else "exact", info.name, what, lost))


def _rounded(
    module: Module, number: float, shared: float, is_inverse: bool, reader: SourceReader
) -> int:
    """How many block scales of a matrix E4M3 cannot hold under the shared scale."""
    info = module.tensor("block_scale")
    if number == shared or info is None:
        return 0
    ratio = (shared, number) if is_inverse else (number, shared)
    (exact,) = exact_scales(*(np.array([value], np.float32) for value in ratio))
    raw = np.empty(info.nbytes, np.uint8)
    reader.read(Read(info.shard, info.offset, info.nbytes), 0, raw.data)
    counts = np.bincount(raw, minlength=256)
    return int(counts[: len(exact)][~exact].sum())
