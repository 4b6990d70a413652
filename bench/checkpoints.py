"""Large checkpoints of random weights, written without holding them in memory.

Qwen3-MoE as transformers 5 saves it (``fused``) or as it is released (``split``), or Llama 4
(``transposed``). Attention, embeddings and router are there, and small: experts are the bulk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

__all__ = [
    "FORMS",
    "Model",
    "add_sizes",
    "of_size",
    "parse_size",
    "sizes_of",
    "write",
    "write_sparse",
]

FORMS = ("fused", "split", "transposed")
_POOL_ITEMS = 1 << 25
_PIECE_ITEMS = 1 << 22
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model; a layer of the default has 1.2 GB of bf16 experts."""

    form: str = "fused"
    layers: int = 2
    experts: int = 128
    hidden: int = 2048
    intermediate: int = 768
    vocab: int = 2048

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(2 * prod(shape) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes, in the order of the files."""
        E, I, H = self.experts, self.intermediate, self.hidden
        block = "feed_forward" if self.form == "transposed" else "mlp"
        router = "router" if self.form == "transposed" else "gate"
        yield "model.embed_tokens.weight", (self.vocab, H)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            experts = f"{prefix}.{block}.experts"
            if self.form == "fused":
                yield f"{experts}.gate_up_proj", (E, 2 * I, H)
                yield f"{experts}.down_proj", (E, H, I)
            elif self.form == "transposed":
                yield f"{experts}.gate_up_proj", (E, H, 2 * I)
                yield f"{experts}.down_proj", (E, I, H)
            else:
                for e in range(E):
                    yield f"{experts}.{e}.down_proj.weight", (H, I)
                    yield f"{experts}.{e}.gate_proj.weight", (I, H)
                    yield f"{experts}.{e}.up_proj.weight", (I, H)
            yield f"{prefix}.{block}.{router}.weight", (E, H)
            for name, rows in (("q", H), ("k", H // 8), ("v", H // 8), ("o", H)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, H)
        yield "model.norm.weight", (H,)
        yield "lm_head.weight", (self.vocab, H)

    def config(self) -> dict[str, object]:
        """What config.json says."""
        config = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
        }
        if self.form == "transposed":
            return config | {
                "model_type": "llama4_text",
                "num_local_experts": self.experts,
                "intermediate_size": self.intermediate,
            }
        return config | {
            "model_type": "qwen3_moe",
            "num_experts": self.experts,
            "moe_intermediate_size": self.intermediate,
        }


def of_size(model: Model, nbytes: int) -> Model:
    """The model with as many layers, at least one, as come nearest to a size."""
    one, two = replace(model, layers=1).nbytes, replace(model, layers=2).nbytes
    return replace(model, layers=max(1, 1 + round((nbytes - one) / (two - one))))


def parse_size(text: str) -> int:
    """Bytes of a size such as 2.4GB, decimal as in `--max-shard-size`."""
    for unit, factor in _UNITS.items():
        if text.upper().endswith(unit):
            return round(float(text[: -len(unit)]) * factor)
    return int(text)


def sizes_of(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(folder: Path, model: Model, shard_nbytes: int) -> None:
    """Write the checkpoint in shards of about a size; a tensor is never divided."""
    write_sparse(folder, in_shards(model.tensors(), shard_nbytes), model.config())
    noise = _noise()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("r+b") as file:
            left = path.stat().st_size - file.seek(8 + int.from_bytes(file.read(8), "little"))
            while left:
                left -= file.write(next(noise)[:left])


def in_shards(tensors: Iterable[tuple[str, Shape]], shard_nbytes: int) -> list[dict[str, Shape]]:
    """Tensors in their order, as many in each shard as fit, at least one."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in tensors:
        nbytes = 2 * prod(shape)
        if shards[-1] and filled + nbytes > shard_nbytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    return shards


def write_sparse(
    folder: Path, shards: Iterable[Mapping[str, Shape]], config: Mapping[str, object]
) -> None:
    """The same with weights that are zeros and take no disk; all tensors are bf16."""
    folder.mkdir(parents=True)
    shards = list(shards)
    weight_map = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(members, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in members.items():
            start, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _noise() -> Iterator[memoryview]:
    """Pieces of bf16 noise, normal with deviation 0.02, without end.

    A piece is a random stretch of one pool of 64 MiB with random bits of sign and mantissa
    flipped: drawing every number anew would take several times as long as writing it.
    """
    import numpy as np

    random = np.random.Generator(np.random.SFC64(0))
    pool = np.empty(_POOL_ITEMS, np.uint16)
    for piece in np.split(pool, 32):
        drawn = random.standard_normal(len(piece), np.float32) * np.float32(0.02)
        piece[:] = drawn.view(np.uint32) >> 16
    while True:
        start = int(random.integers(_POOL_ITEMS - _PIECE_ITEMS))
        flipped = np.uint16(int(random.integers(1 << 16)) & 0x807F)
        yield memoryview((pool[start : start + _PIECE_ITEMS] ^ flipped).view(np.uint8))


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options for the sizes of a model."""
    for name in ("experts", "hidden", "intermediate", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Model(), name), metavar="N")
    parser.add_argument("--shard-size", type=parse_size, default="1.3GB", metavar="SIZE")
