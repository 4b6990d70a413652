"""Checkpoints in every form of the table of families, and the matrices that must come out."""

from __future__ import annotations

import torch
from kit.expert_layouts import config_of, matrices_of, pack, write

from moe_ckpt.layouts.family import CONCAT
from moe_ckpt.layouts.table import FAMILIES
from moe_ckpt.work.batches import Budget

E, LAYERS = 3, 2
# Forms of quantized tensors have names of their own; tests/source has those.
FORMS = [
    (family, form)
    for family in FAMILIES
    for form in family.forms
    if not form.leaves[0].endswith("_blocks")
]
CUT = [
    Budget(1, 1, 1),  # the least that can be read, twice
    Budget(700, 64, 2),
    Budget(4000, 500, 3),
    Budget(6200, 1 << 10, 2),
    Budget(20000, 1 << 12, 4),
]


def make(folder, family, form, i, h, *, dtype=torch.bfloat16, shards=2, count=E):
    """A checkpoint of this form; the matrices and biases that must come out, by module."""
    tensors, matrices, biases = {}, {}, {}
    stack = "blocks" if family.name == "dbrx" else "layers"
    for layer in range(LAYERS):
        prefix = f"model.{stack}.{layer}"
        experts = matrices_of(count, i, h, dtype, seed=5 * layer)
        if not family.is_gated:
            experts = [(None, up, down) for _, up, down in experts]
        stored = pack(form.layout, form.order, experts)
        names = [f"{prefix}.{form.path}.{leaf}" for leaf in (*form.leaves, *form.biases)]
        if form.biases:
            values = torch.arange(count * 2 * i).view(count, 2 * i).to(dtype)
            stored += [values, torch.arange(count * h).view(count, h).to(dtype) - 7]
        tensors |= dict(zip(names, stored, strict=True))
        for e, projections in enumerate(experts):
            module = family.runtime_name(f"{prefix}.{family.split}.{e}")
            present = [matrix for matrix in projections if matrix is not None]
            matrices[module] = dict(zip(family.projections, present, strict=True))
            if form.biases:
                row = stored[-2][e]
                halves = (row[0::2], row[1::2]) if form.order != CONCAT else row.chunk(2)
                for name, bias in zip(family.projections, (*halves, stored[-1][e]), strict=True):
                    biases[f"{module}.{name}.bias"] = bias
    write(folder, tensors, config_of(family.model_types[0], count, i, h, LAYERS), shards)
    return matrices, biases
