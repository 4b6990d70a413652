"""The texts of a plan's files that name every tensor: headers of shards, and the index."""

from __future__ import annotations

from json.encoder import encode_basestring as quoted

from .dtypes import nbytes_of
from .plan import OutTensor, Plan

__all__ = ["header_of", "index_of"]


def header_of(tensors: tuple[OutTensor, ...]) -> bytes:
    """The first bytes of a safetensors file: length and JSON, padded so that data is aligned."""
    # Put together by hand, and so is the index: there can be 300,000 tensors.
    entries = ['"__metadata__":{"format":"pt"}']
    known: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    position = 0
    for name, dtype, shape in tensors:
        if (dtype, shape) not in known:
            sizes = ",".join(map(str, shape))
            known[dtype, shape] = nbytes_of(dtype, shape), f'"dtype":"{dtype}","shape":[{sizes}]'
        nbytes, described = known[dtype, shape]
        end = position + nbytes
        entries.append(f'{quoted(name)}:{{{described},"data_offsets":[{position},{end}]}}')
        position = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(plan: Plan) -> str | None:
    """The text of model.safetensors.index.json; None for a single file, which needs none."""
    if len(plan.shards) == 1:
        return None
    weight_map = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    lines = (f"    {quoted(name)}: {quoted(weight_map[name])}" for name in sorted(weight_map))
    return (
        "{\n"
        '  "metadata": {\n'
        f'    "total_parameters": {plan.num_parameters},\n'
        f'    "total_size": {plan.tensors_nbytes}\n'
        "  },\n"
        '  "weight_map": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
