"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["experts_options", "in_argument", "json_option", "limit_options", "named"]


def named(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty path: it would mean the current folder, and is a variable that is not set."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("is empty")
    return value


in_argument = click.argument("in_dir", metavar="IN", callback=named)


def experts_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a command is told of the experts, stored and written."""
    for option in (
        click.option(
            "--gate-up-order",
            metavar="ORDER",
            help="concat or interleaved: how gate and up lie in one tensor of IN, where that "
            "is open.",
        ),
        click.option(
            "--layout",
            metavar="NAME",
            help="How IN stores experts, where headers and model type leave it open; see layouts.",
        ),
        click.option(
            "--experts",
            default="auto",
            show_default=True,
            help="split: a matrix for each; fused: as ModelOpt fuses Llama 4 and gpt-oss; "
            "auto: what most runtimes read.",
        ),
    ):
        command = option(command)
    return command


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where to compute and with how much; nothing of it changes a byte."""
    for option in (
        click.option(
            "--device-memory",
            default="2GiB",
            show_default=True,
            help="All buffers on the GPU together.",
        ),
        click.option(
            "--memory",
            default="256MiB",
            show_default=True,
            help="All buffers together; the program and about 1 KiB per tensor come on top.",
        ),
        click.option("--workers", type=int, help="Threads; if not given one per core, 16 at most."),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
