"""Tensors that may be the experts of one layer, and the sizes that those must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from ..dtypes import FLOATS
from ..errors import LayoutError, show, show_some
from ..headers import TensorInfo
from .experts import Experts
from .family import CONCAT, LAYOUTS, SPLIT, Family, Form
from .sizes import Sizes

__all__ = ["Container"]

_PROJECTIONS = ("gate", "up", "down")


class Container:
    """Tensors that may be the experts of one layer, before they are checked.

    ``forms`` are the rows of the table that these names fit. ``members`` are the tensors: by
    expert (-1 where all are in one) and position in the form.
    """

    def __init__(self, layer: str, source: str, forms: Sequence[Form]) -> None:
        self.layer, self.source, self.forms = layer, source, tuple(forms)
        self.members: dict[tuple[int, int], str] = {}
        self.biases: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        """All tensors of the container."""
        return [*self.members.values(), *self.biases.values()]

    def check(
        self,
        tensors: Mapping[str, TensorInfo],
        family: Family,
        sizes: Sizes,
        order: Mapping[Form, str],
        packing: str,
    ) -> list[Experts]:
        """The experts, if they are complete and of the sizes that config.json names.

        ``order`` says how gate and up lie in each form, ``packing`` what packed the weights if
        something known did.

        Raises:
            LayoutError: with the shapes found and those expected.
        """
        dtypes = {tensors[name].dtype for name in self.names}
        if not dtypes <= FLOATS or len(dtypes) > 1:
            raise LayoutError(
                f"{show(self.source)}: experts are stored as {', '.join(sorted(dtypes))}"
                f"{f' ({packing})' if packing else ''}; expected BF16, F16 or F32 throughout. "
                "Quantized or packed experts are not supported"
            )
        if self.forms[0].layout == SPLIT:
            return self._check_split(tensors, family, sizes)
        return [self._check_stacked(tensors, family, sizes, order)]

    def _check_stacked(
        self,
        tensors: Mapping[str, TensorInfo],
        family: Family,
        sizes: Sizes,
        order: Mapping[Form, str],
    ) -> Experts:
        leaves = self.forms[0].leaves
        names = [self.members[-1, p] for p in range(len(leaves)) if (-1, p) in self.members]
        if len(names) < len(leaves):
            raise LayoutError(
                f"{show(self.source)}: only {show_some(names)} is there; experts need "
                f"{self.forms[0].describe()}"
            )
        infos = [tensors[name] for name in names]
        shapes = " with ".join(
            f"{show(info.name.removeprefix(f'{self.source}.') if i else info.name)} "
            f"{list(info.shape)}"
            for i, info in enumerate(infos)
        )
        form, found = self._form_of(infos, family, sizes, shapes)
        E, I, H = found["E"], found["I"], found["H"]
        experts = self._experts(
            family, form.layout, tuple(names[:-1]), (names[-1],), 0, E, I, H, shapes, sizes
        )
        biases = self._check_biases(form, tensors, experts)
        joins = LAYOUTS[form.layout].joins_gate_up
        return replace(experts, biases=biases, order=order[form] if joins else CONCAT)

    def _form_of(
        self, infos: list[TensorInfo], family: Family, sizes: Sizes, shapes: str
    ) -> tuple[Form, dict[str, int]]:
        """The one form whose shapes these are, and the sizes."""
        stored = [info.shape for info in infos]
        fits = [
            (form, found)
            for form in self.forms
            if (found := _solve(form.layout, stored, sizes)) is not None
        ]
        expected = " or ".join(
            LAYOUTS[form.layout].describe(family.is_gated) for form in self.forms
        )
        if len(self.forms) > 1 and fits and any(len(set(shape[-2:])) == 1 for shape in stored):
            names = " or ".join(f"--layout {form.layout}" for form in self.forms)
            raise LayoutError(
                f"{shapes}: one of them is square, and {family.name} files exist in both "
                f"orientations; the shapes cannot tell which this is. If you know it, say {names}"
            )
        if len(fits) == 1:
            return fits[0]
        counts = {shape[0] for shape in stored}
        if len(counts) > 1 and all(len(shape) == 3 for shape in stored):
            raise LayoutError(
                f"{shapes}: the numbers of experts differ: {', '.join(map(str, sorted(counts)))}"
            )
        others = [
            layout.name
            for layout in LAYOUTS.values()
            if len(layout.shapes) >= len(stored) and layout.solve(stored) is not None
        ]
        raise LayoutError(
            f"{shapes}: expected {expected}; "
            f"{f'these are {others[0]}' if others else 'these fit no layout'}, and files of family "
            f"{family.name} are not"
        )

    def _check_biases(
        self, form: Form, tensors: Mapping[str, TensorInfo], experts: Experts
    ) -> tuple[str, ...]:
        if not form.biases:
            return ()
        E, I, H = experts.num_experts, experts.intermediate, experts.hidden
        for position, shape in enumerate(((E, 2 * I), (E, H))):
            name = self.biases.get(position)
            found = list(tensors[name].shape) if name else "nothing"
            if found != list(shape):
                leaf = form.biases[position]
                raise LayoutError(
                    f"{show(self.source)}.{leaf}: expected a bias {list(shape)}, found {found}"
                )
        return tuple(self.biases[position] for position in (0, 1))

    def _check_split(
        self, tensors: Mapping[str, TensorInfo], family: Family, sizes: Sizes
    ) -> list[Experts]:
        count = len(family.projections)
        E = max(expert for expert, _ in self.members) + 1
        missing = E * count - len(self.members)
        if missing:
            e, p = next(
                pair for pair in product(range(E), range(count)) if pair not in self.members
            )
            raise LayoutError(
                f"{show(self.source)}: {missing} of {E * count} expert matrices are missing, first "
                f"{_PROJECTIONS[-count:][p]} of expert {e}"
            )
        shapes = [tuple(tensors[self.members[e, p]].shape for p in range(count)) for e in range(E)]
        starts = [0, *(e for e in range(1, E) if shapes[e] != shapes[e - 1])]
        if len(starts) > family.widths:
            e = starts[family.widths]
            raise LayoutError(
                f"{show(self.source)}.{e}: has matrices {_text(shapes[e])}, expert "
                f"{starts[family.widths - 1]} has {_text(shapes[starts[family.widths - 1]])}"
            )
        found = []
        for start, stop in zip(starts, [*starts[1:], E], strict=True):
            text = f"{show(self.source)}.{start} {_text(shapes[start])}"
            solved = LAYOUTS[SPLIT].solve(shapes[start])
            if solved is None:
                expected = LAYOUTS[SPLIT].describe(family.is_gated)
                raise LayoutError(f"{text}: expected {expected}")
            tensors_of = [
                tuple(self.members[e, p] for e in range(start, stop) for p in positions)
                for positions in (range(count - 1), (count - 1,))
            ]
            gate_up, down = tensors_of
            E_here, I, H = stop - start, solved["I"], solved["H"]
            found.append(
                self._experts(family, SPLIT, gate_up, down, start, E_here, I, H, text, sizes)
            )
        return found

    def _experts(
        self,
        family: Family,
        layout: str,
        gate_up: tuple[str, ...],
        down: tuple[str, ...],
        first: int,
        E: int,
        I: int,
        H: int,
        shapes: str,
        sizes: Sizes,
    ) -> Experts:
        for what, value, known in (
            ("experts", E, sizes.experts),
            ("rows of up (I)", I, sizes.intermediate),
            ("columns of up (H)", H, sizes.hidden),
        ):
            if value not in known:
                listed = ", ".join(f"{key}={number}" for number, key in known.items()) or "nothing"
                raise LayoutError(
                    f"{show(self.source)}: {shapes} has {value} {what}, config.json says {listed}"
                )
        return Experts(
            layer=self.layer,
            source=self.source,
            output=f"{family.loader_name(self.layer)}.{family.split}",
            projections=family.projections,
            layout=layout,
            order=CONCAT,
            gate_up=gate_up,
            down=down,
            biases=(),
            first=first,
            num_experts=E,
            hidden=H,
            intermediate=I,
            evidence=(
                f"{shapes}; E={E} ({sizes.experts[E]}), I={I} ({sizes.intermediate[I]}), "
                f"H={H} ({sizes.hidden[H]})"
            ),
        )


def _solve(layout: str, shapes: Sequence[tuple[int, ...]], sizes: Sizes) -> dict[str, int] | None:
    """E, I and H of these shapes; a flat layout gives only E*I, and config.json the factors."""
    found = LAYOUTS[layout].solve(shapes)
    if found is None or "E*I" not in found:
        return found
    rows = found["E*I"]
    pairs = [(E, I) for E, I in product(sizes.experts, sizes.intermediate) if rows == E * I]
    if len(pairs) != 1:
        return None
    return {"E": pairs[0][0], "I": pairs[0][1], "H": found["H"]}


def _text(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
