"""Tensors that may be the experts of one layer, and the sizes that those must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product

from ..dtypes import FLOATS
from ..errors import LayoutError, show, show_some
from ..source.headers import TensorInfo
from .experts import Experts
from .family import LAYOUTS, SPLIT, Family, Form
from .fit import form_of
from .sizes import Sizes

__all__ = ["Container"]

_PROJECTIONS = ("gate", "up", "down")


class Container:
    """Tensors that may be the experts of one layer, before they are checked.

    ``forms`` are those of the family that these names fit. ``members`` are the tensors: by
    expert (-1 where all are in one) and position in the form.
    """

    def __init__(
        self,
        layer: str,
        source: str,
        forms: Sequence[Form],
        tensors: Mapping[str, TensorInfo],
        family: Family,
        sizes: Sizes,
    ) -> None:
        self.layer, self.source, self.forms = layer, source, forms
        self._tensors, self._family, self._sizes = tensors, family, sizes
        self.members: dict[tuple[int, int], str] = {}
        self.biases: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        """All tensors of the container."""
        return [*self.members.values(), *self.biases.values()]

    def check(self, packing: str) -> list[Experts]:
        """The experts, if they are complete and of the sizes that config.json names.

        ``packing`` says what packed the weights, if something known did.

        Raises:
            LayoutError: with the shapes found and those expected.
        """
        dtypes = {self._tensors[name].dtype for name in self.members.values()}
        biases = {self._tensors[name].dtype for name in self.biases.values()}
        if not dtypes | biases <= FLOATS or len(dtypes) > 1:
            dtypes |= biases
            raise LayoutError(
                f"{show(self.source)}: experts are stored as {', '.join(sorted(dtypes))}"
                f"{f' ({packing})' if packing else ''}; expected BF16, F16 or F32 throughout; "
                "start from the original release"
            )
        return self._check_split() if self.forms[0].layout == SPLIT else [self._check_stacked()]

    def _check_stacked(self) -> Experts:
        leaves = self.forms[0].leaves
        names = [self.members[-1, p] for p in range(len(leaves)) if (-1, p) in self.members]
        if len(names) < len(leaves):
            raise LayoutError(
                f"{show(self.source)}: only {show_some(self.names)} is there; experts need "
                f"{self.forms[0].describe()}"
            )
        infos = [self._tensors[name] for name in names]
        shapes = " with ".join(
            f"{show(info.name.removeprefix(f'{self.source}.') if i else info.name)} "
            f"{list(info.shape)}"
            for i, info in enumerate(infos)
        )
        stored = [info.shape for info in infos]
        form, E, I, H = form_of(stored, self.forms, self._family, self._sizes, shapes)
        experts = self._experts(form, names[:-1], names[-1:], 0, (E, I, H), shapes)
        return replace(experts, biases=self._check_biases(form, E, I, H))

    def _check_biases(self, form: Form, E: int, I: int, H: int) -> tuple[str, ...]:
        shapes = ([E, 2 * I], [E, H])
        for position, (leaf, shape) in enumerate(zip(form.biases, shapes, strict=False)):
            name = self.biases.get(position)
            found = list(self._tensors[name].shape) if name else "nothing"
            if found != shape:
                raise LayoutError(
                    f"{show(self.source)}.{leaf}: expected a bias {shape}, found {found}"
                )
        return tuple(self.biases[position] for position in range(len(form.biases)))

    def _check_split(self) -> list[Experts]:
        form, count = self.forms[0], len(self.forms[0].leaves)
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
        names = [[self.members[e, p] for p in range(count)] for e in range(E)]
        shapes = [tuple(self._tensors[name].shape for name in group) for group in names]
        found: list[Experts] = []
        start = 0
        for stop in self._group_ends(E):
            text = f"{show(self.source)}.{start} {_text(shapes[start])}"
            solved = LAYOUTS[SPLIT].solve(shapes[start])
            if solved is None:
                expected = LAYOUTS[SPLIT].describe(self._family.is_gated)
                raise LayoutError(f"{text}: expected {expected}")
            for e in range(start, stop):
                if shapes[e] != shapes[start]:
                    raise LayoutError(
                        f"{show(self.source)}.{e}: has matrices {_text(shapes[e])}, expert "
                        f"{start} has {_text(shapes[start])}"
                    )
            I, H = solved["I"], solved["H"]
            if self._family.widths > 1 and self._sizes.widths[len(found)] != I:
                raise LayoutError(
                    f"{text}: has {I} rows of up (I), config.json says "
                    f"{self._sizes.widths[len(found)]} for experts {start} to {stop - 1}"
                )
            gate_up = [name for group in names[start:stop] for name in group[:-1]]
            down = [group[-1] for group in names[start:stop]]
            found.append(self._experts(form, gate_up, down, start, (stop - start, I, H), text))
            start = stop
        return found

    def _group_ends(self, E: int) -> list[int]:
        """Where each group of experts of one width ends."""
        family, sizes = self._family, self._sizes
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
        form: Form,
        gate_up: Sequence[str],
        down: Sequence[str],
        first: int,
        found: tuple[int, int, int],
        shapes: str,
    ) -> Experts:
        """Experts of the sizes ``found``, E, I and H, if config.json names those."""
        E, I, H = found
        family, sizes = self._family, self._sizes
        for what, value, known in (
            ("experts", E, sizes.experts),
            ("rows of up (I)", I, sizes.intermediate),
            ("columns of up (H)", H, sizes.hidden),
        ):
            if value not in known:
                raise LayoutError(
                    f"{show(self.source)}: {shapes} has {value} {what}, {sizes.said(known)}; "
                    "take weights and config.json from one release"
                )
        return Experts(
            layer=self.layer,
            source=self.source,
            output=f"{family.runtime_name(self.layer)}.{family.split}",
            projections=family.projections,
            layout=form.layout,
            order=form.order,
            gate_up=tuple(gate_up),
            down=tuple(down),
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
