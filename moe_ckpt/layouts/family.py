"""What a row of the table of families says, and the layouts that it refers to.

A layout is the shapes of the tensors that hold the experts of one layer, in terms of E experts,
I rows of gate and of up, and H columns of gate. Matrices are [out, in]: gate and up [I, H], down
[H, I]; a tensor whose last dimension is the other one stores them transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..runtimes import SGLANG, TRANSFORMERS, TRTLLM, VLLM

__all__ = ["CONCAT", "INTERLEAVED", "LAYOUTS", "ORDERS", "SPLIT", "Family", "Form", "Layout"]

CONCAT, INTERLEAVED = ORDERS = ("concat", "interleaved")
SPLIT = "split"


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of gate_up and down, or of gate, up and down, by the names of their dimensions."""

    name: str
    shapes: tuple[tuple[str, ...], ...]
    summary: str

    @property
    def joins_gate_up(self) -> bool:
        """Whether gate and up are in one tensor."""
        return "2I" in self.shapes[0]

    def solve(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int] | None:
        """The sizes for which these are the shapes; None if there are none.

        For experts without a gate, ``shapes`` is one short.

        >>> LAYOUTS["fused"].solve([(4, 48, 64), (4, 64, 24)])
        {'E': 4, 'I': 24, 'H': 64}
        >>> LAYOUTS["fused-transposed"].solve([(4, 48, 64), (4, 64, 24)])
        """
        sizes: dict[str, int] = {}
        for named, shape in zip(self.shapes[-len(shapes) :], shapes, strict=True):
            if len(named) != len(shape):
                return None
            for name, size in zip(named, shape, strict=True):
                half, odd = divmod(size, 2)
                if name == "2I" and odd:
                    return None
                name, size = ("I", half) if name == "2I" else (name, size)
                if not size or sizes.setdefault(name, size) != size:
                    return None
        return sizes

    def describe(self, gated: bool = True) -> str:
        """The shapes as text, such as ``[E, 2I, H], [E, H, I]``."""
        shapes = self.shapes if gated or len(self.shapes) < 3 else self.shapes[1:]
        return ", ".join(f"[{', '.join(shape)}]" for shape in shapes)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            SPLIT,
            (("I", "H"), ("I", "H"), ("H", "I")),
            "a matrix for each expert and projection",
        ),
        Layout("fused", (("E", "2I", "H"), ("E", "H", "I")), "gate and up in one 3-D tensor"),
        Layout(
            "fused-transposed",
            (("E", "H", "2I"), ("E", "I", "H")),
            "the same with every matrix transposed",
        ),
        Layout(
            "stacked",
            (("E", "I", "H"), ("E", "I", "H"), ("E", "H", "I")),
            "gate, up and down in a 3-D tensor each",
        ),
        Layout(
            "flat",
            (("E*I", "H"), ("E*I", "H"), ("E*I", "H")),
            "gate, up and transposed down in a 2-D tensor each",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Form:
    """Names for a layout: ``{layer}.{path}.{leaf}``.

    ``leaves``: of gate_up and down, or of gate, up and down; without a gate, of up and down.
    ``order``: how gate and up lie in one tensor.
    ``order_flag``: key of the config that must be true, or not there, for the order to be known.
    ``biases``: leaves of the biases of gate_up and down.
    """

    layout: str
    path: str
    leaves: tuple[str, ...]
    order: str = CONCAT
    order_flag: str = ""
    biases: tuple[str, ...] = ()

    @property
    def joins_gate_up(self) -> bool:
        """Whether gate and up are in one tensor."""
        return LAYOUTS[self.layout].joins_gate_up

    def describe(self) -> str:
        """Where the tensors are, such as ``mlp.experts.{gate_up_proj, down_proj}``."""
        return f"{self.path}.{{{', '.join(self.leaves)}}}"


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that store their experts alike; what a row leaves out is most families' way.

    ``roots``: what released checkpoints have before ``layers.0`` (or ``blocks.0``) of the text
        model, the most usual first; '' where they have nothing. Runtimes read these.
    ``split``: path from the layer to the experts, of the per-expert form, which is the form that
        is written: ``{layer}.{split}.{e}.{projection}.weight``.
    ``projections``: the names of gate, up and down in that form; of up and down without a gate.
    ``forms``: the other forms that can be read. Two with the same names: the shapes decide, and
        a square matrix cannot be told.
    ``widths``: how many groups of experts, each of its own width, follow one another in a layer.
    ``renames``: what transformers 5 calls tensors of layers with fused experts, and what runtimes
        call them; prefixes of the path below the layer, the first that fits is applied.
    ``prefixes``: the same for the beginnings of whole names.
    ``not_restorable``: parts of names that only transformers 5 writes and this table cannot
        turn back; a checkpoint that has them is refused.
    ``uneven``: parts of names that some layers have and others, otherwise like them, have not.
    ``built_as``: routers that runtimes build under names that no tensor has, below the layer.
    ``runtimes``: which have the model and read the split form, for all of the model types.
    ``in_tensorrt_llm``: the model types whose classes TensorRT-LLM has (_torch/models/
        _arch_index.py); it reads their split form.
    ``as_released``: formats of the experts of the release, which runtimes read under ``fp8``
        though they do not read others.
    ``fused_runtimes``: which read ModelOpt's fused export of the model, by format; empty if
        ModelOpt has none.
    ``instead``: what the user must know about the other runtimes; what works, if none reads
        either form.
    ``released_as``: the architectures that the runtimes of servers know, where transformers
        saves another that they do not.
    ``in_transformers``: whether transformers has the model.
    ``renamed_in_transformers``: whether it builds linear layers under other names than the
        checkpoint's, which no list of what is quantized reaches: it loads the model unquantized.
    ``checked``: how this row is known to be right, see `CHECKS` in the table.
    """

    name: str
    model_types: tuple[str, ...]
    roots: tuple[str, ...] = ("model.",)
    split: str = "mlp.experts"
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    forms: tuple[Form, ...] = (Form("fused", "mlp.experts", ("gate_up_proj", "down_proj")),)
    widths: int = 1
    renames: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    not_restorable: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()
    built_as: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = (VLLM, SGLANG, TRANSFORMERS)
    in_tensorrt_llm: tuple[str, ...] = ()
    as_released: tuple[str, ...] = ()
    fused_runtimes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    instead: str = ""
    released_as: tuple[str, ...] = ()
    in_transformers: bool = True
    renamed_in_transformers: bool = False
    checked: str = "module"

    @property
    def is_gated(self) -> bool:
        """Whether experts have a gate."""
        return len(self.projections) == 3

    @property
    def split_form(self) -> Form:
        """The per-expert form; an expert's number is between its path and its leaves."""
        return Form(SPLIT, self.split, tuple(f"{name}.weight" for name in self.projections))

    def describe_split(self) -> str:
        """Where the tensors of that form are; E stands for the expert."""
        return f"{self.split}.E.{{{', '.join(self.projections)}}}.weight"

    def split_runtimes(self, model_type: str) -> tuple[str, ...]:
        """The runtimes that have the model and read its experts one by one."""
        more = (TRTLLM,) if model_type in self.in_tensorrt_llm else ()
        return (*self.runtimes, *more)

    @property
    def reads_split(self) -> bool:
        """Whether experts are known one by one: where they have biases, they are not."""
        return not any(form.biases for form in self.forms)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that can be read, the split one last."""
        fused = dict.fromkeys(form.layout for form in self.forms)
        return (*fused, *([SPLIT] if self.reads_split else []))

    def runtime_name(self, name: str) -> str:
        """The name that runtimes give to a tensor or module whose prefix transformers changes."""
        for old, new in self.prefixes:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name
