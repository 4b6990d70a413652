"""How quantized checkpoints store weights: what lies beside the codes.

An encoding is a number format of ours in the spelling of one producer: which tensors, called what,
of which dtypes. All follow from the parts of the formats and the tables of `dialects`. Names,
dtypes and shapes decide which one a weight has; what the config says is checked against it
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..dialects.dialect import Spelling
from ..dialects.fp8.table import BLOCKS, DEEPSEEK
from ..dialects.methods import METHODS
from ..formats import WHOLE_ROW, Part, find_format
from .headers import TensorInfo

__all__ = [
    "CODE_DTYPES",
    "ENCODINGS",
    "INPUT_NAMES",
    "REFUSED_ENDINGS",
    "SCALE_ENDINGS",
    "SHAPE_ENDINGS",
]
__all__ += ["Encoding", "Scale", "input_name_of", "name_beside"]

_TILE = next(size for size, name in BLOCKS.items() if name == DEEPSEEK.format)

# The dtypes in which a scale is found that our format has in one of them.
_FLOATS = ("F32", "BF16", "F16")
_ALIKE = {"F32": _FLOATS, "BF16": _FLOATS, "U8": ("U8", "F8_E8M0")}


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor beside the codes: a part of the format, its ending, and the dtypes it may have."""

    role: str
    ending: str
    dtypes: tuple[str, ...]
    columns: int
    rows: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the columns must be a multiple of those of an item."""
        return self.rows == 1 and self.columns not in (0, WHOLE_ROW)

    def part(self, dtype: str) -> Part:
        """The part of a matrix that such a tensor holds."""
        return Part(self.role, dtype, self.columns, self.rows)


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to store quantized weights.

    ``ending`` is what follows the weight's name in that of its codes, ``dtypes`` are the codes',
    ``columns`` is how many weights one of their items holds. ``inverse``: roles that hold the
    reciprocal. ``shape_ending``: the ending of a tensor that holds N and K, '' for none.
    ``input_name``: what the scale of activations is called in the module.
    """

    name: str
    format: str
    ending: str
    dtypes: tuple[str, ...]
    columns: int
    scales: tuple[Scale, ...]
    inverse: tuple[str, ...] = ()
    shape_ending: str = ""
    input_name: str = ""

    def sizes(self, codes: TensorInfo) -> tuple[tuple[int, ...], int, int] | None:
        """Leading dimensions, N and K of the weights with these codes; None if there are none."""
        shape = codes.shape
        if self.ending == "_blocks":  # [..., K / 32, 16]
            shape = (*shape[:-2], shape[-2] * shape[-1]) if len(shape) > 2 else ()
        if len(shape) not in (2, 3) or not all(shape):
            return None
        return shape[:-2], shape[-2], shape[-1] * self.columns

    def fits(self, codes: TensorInfo, beside: Mapping[str, TensorInfo]) -> bool:
        """Whether these are such codes and their scales; ``beside`` has those by their endings."""
        sizes = self.sizes(codes) if codes.dtype in self.dtypes else None
        if sizes is None:
            return False
        lead, n, k = sizes
        for scale in self.scales:
            info = beside.get(scale.ending)
            if info is None or info.dtype not in scale.dtypes:
                return False
            if scale.is_whole and k % scale.columns:
                return False
            if info.shape not in self.shapes_of(scale, lead, n, k):
                return False
        return True

    def shapes_of(
        self, scale: Scale, lead: tuple[int, ...], n: int, k: int
    ) -> set[tuple[int, ...]]:
        """The shapes that a scale may have beside weights [*lead, N, K].

        Matrices of a stack may share a number. Where ``weight_scale_inv`` could be that of the only
        block of a matrix, it is.
        """
        found = _alternatives(lead, scale.part(scale.dtypes[0]).shape(n, k))
        if scale.columns:
            return found
        if scale.ending == "_scale_inv" and n <= _TILE[0] and k <= _TILE[1]:
            found.discard((*lead, 1, 1))
        return found | {(), (1,)}


def _alternatives(lead: tuple[int, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes in which a part is found: [] or [1], [N, 1] or [N], [N, K] or [N, 1, K, 1].

    Not [1, N] for [N, 1]: those would be scales of columns.
    """
    found = [shape, tuple(size for size in shape if size != 1)]
    found.append(tuple(size for each in shape for size in (each, 1)))
    if not found[1]:
        found += [(1,), (1, 1)]
    return {(*lead, *each) for each in found}


def _encoding(spelling: Spelling) -> Encoding:
    """The encoding that a spelling makes of a format's parts."""
    row = find_format(spelling.format)
    codes = next(part for part in row.parts if part.role == "qweight")
    return Encoding(
        name=spelling.what,
        format=row.name,
        ending=_ending(spelling.suffixes["qweight"]),
        dtypes=(codes.dtype, *spelling.code_dtypes),
        columns=codes.columns,
        scales=tuple(
            Scale(
                part.role,
                _ending(spelling.suffixes[part.role]),
                spelling.scale_dtypes.get(part.role, _ALIKE.get(part.dtype, (part.dtype,))),
                part.columns,
                part.rows,
            )
            for part in row.parts
            if part.role not in ("qweight", "input_scale")
        ),
        inverse=tuple(sorted(spelling.inverse)),
        shape_ending=_ending(spelling.shape_suffix) if spelling.shape_suffix else "",
        input_name=spelling.suffixes.get("input_scale", ""),
    )


def _ending(suffix: str) -> str:
    """What a suffix of a module adds to the name of its weight, or of a stack of them.

    With a dot it is the name of another tensor of the module, see `name_beside`.

    >>> _ending("weight"), _ending("weight_scale"), _ending("blocks"), _ending("scale")
    ('', '_scale', '_blocks', '.scale')
    """
    rest = suffix.removeprefix("weight")
    if rest != suffix:
        return rest
    return f"_{suffix}" if suffix in ("blocks", "scales") else f".{suffix}"


def name_beside(stem: str, ending: str) -> str:
    """The tensor with this ending beside a weight.

    >>> name_beside("a.weight", "_scale"), name_beside("a.weight", ".scale")
    ('a.weight_scale', 'a.scale')
    """
    return (stem.removesuffix(".weight") if ending.startswith(".") else stem) + ending


def _precedence(encoding: Encoding) -> tuple[int, ...]:
    """What orders encodings, of which the first that fits counts.

    Several may fit the same codes. Beside ``weight_scale_inv`` nobody means ``weight_scale``, so
    the longer name comes first. And scales of a small matrix may be of several kinds: a single one
    is then the matrix's, and one for each row is taken for that before it is one of a block; so
    coarse scales come before fine ones. What comes before that, kinds of codes, decides only what
    a weight is said to be that has lost so much that it could be several.
    """
    row, finest = find_format(encoding.format), encoding.scales[0]
    is_integer = row.codes is not None and row.codes.is_integer
    weights_of_an_item = finest.columns * finest.rows or 2 * WHOLE_ROW
    return (
        is_integer,
        -row.weight_bits,
        -len(encoding.scales),
        -len(finest.ending),
        -weights_of_an_item,
    )


_SPELLINGS = tuple(row for method in METHODS.values() for row in method.spellings)

# Formats that differ in activations only are told apart by the scale of these, see `weights`.
ENCODINGS: tuple[Encoding, ...] = tuple(
    sorted(
        dict.fromkeys(
            _encoding(row) for row in _SPELLINGS if find_format(row.format).weights == row.format
        ),
        key=_precedence,
    )
)

CODE_DTYPES = frozenset(dtype for of in ENCODINGS for dtype in of.dtypes)

# What may lie beside codes, after the name of their weight: what is not needed, ...
SHAPE_ENDINGS = tuple(dict.fromkeys(of.shape_ending for of in ENCODINGS if of.shape_ending))
# ... and what is not understood: zero points, and columns out of order.
REFUSED_ENDINGS = ("_zero_point", "_g_idx")

# What the scale of activations is called in a module; where two are there the first counts.
INPUT_NAMES = tuple(
    dict.fromkeys(
        row.suffixes["input_scale"] for row in _SPELLINGS if "input_scale" in row.suffixes
    )
)

# Tensors with these endings mean nothing without their weight; ".scale" may mean anything, unless
# its numbers are E8M0.
SCALE_ENDINGS = (
    *(f"weight{ending}" for ending in (*SHAPE_ENDINGS, *REFUSED_ENDINGS)),
    *dict.fromkeys(
        suffix
        for row in _SPELLINGS
        for suffix in row.suffixes.values()
        if suffix.startswith(("weight_", "qscale_weight"))
    ),
    *(f"_proj{ending}" for ending in ("_scale_inv", "_blocks", "_scales")),
)


def input_name_of(what: str) -> str:
    """What the scale of activations is called beside weights that are stored as ``what``."""
    names = (of.input_name for of in ENCODINGS if of.name == what and of.input_name)
    return next(names, INPUT_NAMES[0])
