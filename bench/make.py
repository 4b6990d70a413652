"""Make a large checkpoint of random weights, without holding it in memory.

python -m bench make OUT                        # 2.5 GB, two layers, fused experts
python -m bench make OUT --form split --layers 7 --shard-size 500MB
python -m bench make OUT --form transposed --experts 16 --hidden 5120 --intermediate 8192
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .checkpoints import FORMS, Model, add_sizes, sizes_of, write

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--form", choices=FORMS, default=Model().form)
    parser.add_argument("--layers", type=int, default=Model().layers, metavar="N")
    add_sizes(parser)


def run(args: argparse.Namespace) -> None:
    """Make one."""
    model = Model(args.form, args.layers, args.experts, args.hidden, args.intermediate, args.vocab)
    write(args.out, model, args.shard_size)
    print(f"{args.out}: {sizes_of(args.out) / 1e9:.2f} GB")
