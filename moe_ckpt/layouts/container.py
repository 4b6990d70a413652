"""Tensors that may be the experts of one layer, and the sizes that those must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product

from ..dtypes import FLOATS
from ..errors import LayoutError, show, show_some
from ..headers import TensorInfo
from .experts import Experts
from .family import CONCAT, LAYOUTS, SPLIT, Family, Form
from .fit import form_of
from .sizes import Sizes, listed

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
                f"{f' ({packing})' if packing else ''}; expected BF16, F16 or F32 throughout; "
                "start from the original release"
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
                f"{show(self.source)}: only {show_some(self.names)} is there; experts need "
                f"{self.forms[0].describe()}"
            )
        infos = [tensors[name] for name in names]
        shapes = " with ".join(
            f"{show(info.name.removeprefix(f'{self.source}.') if i else info.name)} "
            f"{list(info.shape)}"
            for i, info in enumerate(infos)
        )
        stored = [info.shape for info in infos]
        form, E, I, H = form_of(stored, self.forms, family, sizes, shapes)
        experts = self._experts(
            family, form.layout, tuple(names[:-1]), (names[-1],), 0, E, I, H, shapes, sizes
        )
        biases = self._check_biases(form, tensors, experts)
        joins = LAYOUTS[form.layout].joins_gate_up
        return replace(experts, biases=biases, order=order[form] if joins else CONCAT)

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
        found: list[Experts] = []
        start = 0
        for stop in self._group_ends(E, family, sizes):
            text = f"{show(self.source)}.{start} {_text(shapes[start])}"
            solved = LAYOUTS[SPLIT].solve(shapes[start])
            if solved is None:
                expected = LAYOUTS[SPLIT].describe(family.is_gated)
                raise LayoutError(f"{text}: expected {expected}")
            for e in range(start, stop):
                if shapes[e] != shapes[start]:
                    raise LayoutError(
                        f"{show(self.source)}.{e}: has matrices {_text(shapes[e])}, expert "
                        f"{start} has {_text(shapes[start])}"
                    )
            gate_up, down = (
                tuple(self.members[e, p] for e in range(start, stop) for p in positions)
                for positions in (range(count - 1), (count - 1,))
            )
            count_here, I, H = stop - start, solved["I"], solved["H"]
            if family.widths > 1 and sizes.widths[len(found)] != I:
                raise LayoutError(
                    f"{text}: has {I} rows of up (I), config.json says "
                    f"{sizes.widths[len(found)]} for experts {start} to {stop - 1}"
                )
            found.append(
                self._experts(family, SPLIT, gate_up, down, start, count_here, I, H, text, sizes)
            )
            start = stop
        return found

    def _group_ends(self, E: int, family: Family, sizes: Sizes) -> list[int]:
        """Where each group of experts of one width ends."""
        if family.widths == 1:
            return [E]
        counts = sizes.counts * (family.widths // max(len(sizes.counts), 1))
        if len(counts) != family.widths or len(sizes.widths) != family.widths or sum(counts) != E:
            raise LayoutError(
                f"{show(self.source)}: has {E} experts; family {family.name} has groups of "
                f"{family.widths} widths, config.json says {list(counts)} experts of widths "
                f"{list(sizes.widths)}"
            )
        return list(accumulate(counts))

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
                raise LayoutError(
                    f"{show(self.source)}: {shapes} has {value} {what}, config.json says "
                    f"{listed(known)}"
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


def _text(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
