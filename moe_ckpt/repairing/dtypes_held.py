"""Scales whose bytes are right under a dtype that runtimes do not hold them in.

A power of two is a byte, whatever it is called. Runtimes hold those of MXFP4 and MXFP8 as U8, and
what is copied there from F8_E8M0 is converted as a number: 2**-7 becomes 0.
"""

from __future__ import annotations

from ..formats import find_format
from .draft import Draft, Mend

__all__ = ["hold_scales_as_bytes"]


def hold_scales_as_bytes(draft: Draft) -> None:
    """Call E8M0 scales U8 where that is what the format has."""
    for module in draft.inventory.quantized:
        held = {part.role: part.dtype for part in find_format(module.format).parts}
        for part, info in module.parts:
            if info.dtype == "F8_E8M0" and held.get(part.role) == "U8":
                draft.dtypes[info.name] = "U8"
                draft.mended.add(info.name)
                draft.mends.append(Mend("dtype", info.name, "F8_E8M0 becomes U8"))
