"""Make a large Qwen3-MoE or Llama 4 checkpoint of random weights, without holding it in memory.

python bench/make_checkpoint.py OUT --form fused     # about 8 GB, a 4 GB gate_up tensor
python bench/make_checkpoint.py OUT --form split --shard-size 500MB
python bench/make_checkpoint.py OUT --form transposed --experts 16 --hidden 5120 --intermediate 8192
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK_ITEMS = 1 << 24


def tensors(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    E, I, H = args.experts, args.intermediate, args.hidden
    yield "model.embed_tokens.weight", (args.vocab, H)
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}"
        if args.form == "fused":
            yield f"{prefix}.mlp.experts.gate_up_proj", (E, 2 * I, H)
            yield f"{prefix}.mlp.experts.down_proj", (E, H, I)
        elif args.form == "transposed":
            yield f"{prefix}.feed_forward.experts.gate_up_proj", (E, H, 2 * I)
            yield f"{prefix}.feed_forward.experts.down_proj", (E, I, H)
        else:
            for e in range(E):
                yield f"{prefix}.mlp.experts.{e}.down_proj.weight", (H, I)
                yield f"{prefix}.mlp.experts.{e}.gate_proj.weight", (I, H)
                yield f"{prefix}.mlp.experts.{e}.up_proj.weight", (I, H)
        yield f"{prefix}.mlp.gate.weight", (E, H)
        for name, rows in (("q", H), ("k", H // 8), ("v", H // 8), ("o", H)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, H)
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (args.vocab, H)


def write_shard(path: Path, members: list[tuple[str, tuple[int, ...]]], noise: bytes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in members:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        view = memoryview(noise)
        while end:
            count = file.write(view[: min(len(view), end)])
            end -= count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--form", choices=("fused", "split", "transposed"), default="fused")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=98304)
    parser.add_argument("--shard-size", default="5GB")
    args = parser.parse_args()
    units = {"GB": 10**9, "MB": 10**6}
    limit = int(args.shard_size[:-2]) * units[args.shard_size[-2:]]

    args.out.mkdir(parents=True)
    weights = np.random.default_rng(0).standard_normal(BLOCK_ITEMS, np.float32) * 0.02
    noise = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # truncated to bfloat16
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors(args):
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += nbytes
    weight_map = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(args.out / file, members, noise)
        weight_map |= {name: file for name, _ in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama4_text" if args.form == "transposed" else "qwen3_moe",
        "num_hidden_layers": args.layers,
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_experts": args.experts,
        "vocab_size": args.vocab,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
