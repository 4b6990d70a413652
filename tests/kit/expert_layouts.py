"""Checkpoints of experts in every layout, and what must become of each matrix.

`pack` is the definition of the layouts, written apart from the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from kit.with_scales import encode
from safetensors.torch import load_file, save_file

from moe_ckpt.formats import find_format

CODECS = {
    "nvfp4": (
        find_format("nvfp4"),
        {"qweight": "", "block_scale": "_scale", "global_scale": "_scale_2"},
    ),
    "fp8-tensor": (find_format("fp8-tensor"), {"qweight": "", "global_scale": "_scale"}),
}


def position_coded(expert: int, projection: int, n: int, k: int, dtype) -> torch.Tensor:
    """[n, k] with values that any other expert, projection, row or column would not give.

    They are exact in bfloat16, and far enough apart to be told from each other in four bits.
    """
    rows, columns = torch.arange(n).view(-1, 1), torch.arange(k).view(1, -1)
    code = (expert * 7919 + projection * 104729 + rows * rows * 31 + columns * 57) % 251
    return ((code - 125) / 64).to(dtype)


def matrices_of(count, i, h, dtype=torch.bfloat16, seed=0):
    """Position-coded gate, up and down of ``count`` experts, each with an amax of its own."""
    return [
        [
            position_coded(e + seed, p, *shape, dtype) * 2.0 ** (e % 3 - 2)
            for p, shape in enumerate(((i, h), (i, h), (h, i)))
        ]
        for e in range(count)
    ]


def pack(layout, order, experts):
    """The tensors that hold experts [(gate, up, down), ...], gate None where there is none."""
    gate, up, down = zip(*experts, strict=True)
    if layout == "stacked":
        found = [torch.stack(up), torch.stack(down)]
        return found if gate[0] is None else [torch.stack(gate), *found]
    if layout == "flat":
        return [torch.cat(gate), torch.cat(up), torch.cat([d.T for d in down])]
    joined = [
        torch.stack((g, u), 1).flatten(0, 1) if order == "interleaved" else torch.cat((g, u))
        for g, u in zip(gate, up, strict=True)
    ]
    if layout == "fused":
        return [torch.stack(joined), torch.stack(down)]
    assert layout == "fused-transposed"
    return [torch.stack([m.T for m in joined]), torch.stack([d.T for d in down])]


def config_of(model_type, experts, i, h, layers):
    """The config of a model with these sizes."""
    return {
        "model_type": model_type,
        "num_experts": experts,
        "moe_intermediate_size": i,
        "hidden_size": h,
        "num_hidden_layers": layers,
    }


def write(folder: Path, tensors, config, shards=1):
    """A checkpoint; neighbouring names land in different shards."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = [f"model-{s + 1:05d}-of-{shards:05d}.safetensors" for s in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    for s, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[s::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[s] for s in range(shards) for name in names[s::shards]}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def expected_parts(matrices, number_format):
    """Quantized one by one, straight from the definition of sharing.

    ``matrices``: {module: {projection: matrix}}; all but the last projection share an amax.
    """
    codec, suffixes = CODECS[number_format]
    found = {}
    for module, projections in matrices.items():
        *reading, last = projections
        for names in (reading, [last]):
            amax = torch.stack([projections[n].abs().max() for n in names]).float().max().view(1)
            for name in names:
                weight = projections[name].contiguous()[None]
                parts = encode(codec, weight, amax)
                found |= {
                    f"{module}.{name}.weight{suffix}": parts[role][0]
                    for role, suffix in suffixes.items()
                }
                found[f"{module}.{name}.input_scale"] = torch.tensor(1.0)
    return found


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def check(out: Path, expected):
    """The folder holds these tensors and no others, bit for bit."""
    found = load(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name
