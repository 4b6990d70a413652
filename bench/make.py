"""Make a large checkpoint of random weights, without holding it in memory.

python -m bench make OUT                        # 2.5 GB, two layers, fused experts
python -m bench make OUT --form split --layers 7 --shard-size 500MB
python -m bench make OUT --form transposed --experts 16 --hidden 5120 --intermediate 8192
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from . import processes
from .checkpoints import FORMS, Model, add_sizes, sizes_of, write

__all__ = ["add_arguments", "make_apart", "run"]


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


def make_apart(folder: Path, model: Model, shard_nbytes: int) -> None:
    """The same in a process of its own: numpy would stay in this one, see `processes`."""
    options = [f"--{name}={value}" for name, value in asdict(model).items()]
    command = [sys.executable, "-m", "bench", "make", folder, *options]
    made = processes.run([*command, f"--shard-size={shard_nbytes}"])
    if made.error:
        sys.exit(f"no input could be made: {made.error}")
