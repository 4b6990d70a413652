"""Which form of a family the shapes of fused experts fit, or why they fit none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from ..errors import LayoutError
from .family import LAYOUTS, SPLIT, Family, Form
from .sizes import Sizes, listed

__all__ = ["form_of"]


def form_of(
    shapes: Sequence[tuple[int, ...]],
    forms: Sequence[Form],
    family: Family,
    sizes: Sizes,
    text: str,
) -> tuple[Form, int, int, int]:
    """The one form that tensors of these shapes can have, and E, I and H.

    ``forms`` have the same names, ``text`` shows the tensors.

    Raises:
        LayoutError: none fits, or a square matrix leaves it open which does.
    """
    fits = [
        (form, found) for form in forms if (found := LAYOUTS[form.layout].solve(shapes)) is not None
    ]
    if len(forms) > 1 and fits and any(len(set(shape[-2:])) == 1 for shape in shapes):
        names = " or ".join(f"--layout {form.layout}" for form in forms)
        raise LayoutError(
            f"{text}: one of them is square, and {family.name} files exist in both "
            f"orientations; the shapes cannot tell which this is. If you know it, say {names}"
        )
    if len(fits) == 1:
        form, found = fits[0]
        E, I = (found["E"], found["I"]) if "E" in found else _factors(found["E*I"], sizes, text)
        return form, E, I, found["H"]
    expected = " or ".join(LAYOUTS[form.layout].describe(family.is_gated) for form in forms)
    raise LayoutError(f"{text}: expected {expected}; {_why_not(shapes)}")


def _factors(rows: int, sizes: Sizes, text: str) -> tuple[int, int]:
    """E and I of a flat tensor, of which the shape gives only the product."""
    pairs = [(E, I) for E, I in product(sizes.experts, sizes.intermediate) if rows == E * I]
    if len(pairs) != 1:
        found = " and ".join(f"{E} * {I}" for E, I in pairs) or "no product of them"
        raise LayoutError(
            f"{text}: {rows} rows are {found}, where config.json says E is "
            f"{listed(sizes.experts)} and I is {listed(sizes.intermediate)}"
        )
    return pairs[0]


def _why_not(shapes: Sequence[tuple[int, ...]]) -> str:
    counts = sorted({shape[0] for shape in shapes if shape})
    if len(counts) > 1 and all(len(shape) == 3 for shape in shapes):
        return f"the numbers of experts differ: {', '.join(map(str, counts))}"
    others = [
        layout.name
        for layout in LAYOUTS.values()
        if layout.name != SPLIT
        and len(layout.shapes) >= len(shapes)
        and layout.solve(shapes) is not None
    ]
    if others:
        return f"these are {' or '.join(others)}, which this family does not use"
    if len(shapes) == 2 and all(len(shape) == 3 for shape in shapes):
        (_, a, b), (_, c, d) = shapes
        if (a == 2 * c and b == d) or (b == 2 * d and a == c):
            return "gate_up and down are stored in opposite orientations"
        if b == c and a % 2:
            return f"gate and up together have an odd number of rows, {a}"
    return "these fit no layout"
