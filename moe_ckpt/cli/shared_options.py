"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import click

from ..limits import Limits
from ..planning.options import Options, flag_of

__all__ = ["in_argument", "json_option", "limit_options", "named", "plan_options"]


_LIMITS = Limits()


def named(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty path: it would mean the current folder, and is a variable that is not set."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("is empty")
    return value


in_argument = click.argument("in_dir", metavar="IN", callback=named)


def plan_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a plan, from the fields of `Options`: those of these names, or all."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(fields(Options)):
            if not names or option.name in names:
                command = _plan_option(option)(command)
        return command

    return add


def _plan_option(option: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag, default = flag_of(option), option.default
    if isinstance(default, bool):
        return click.option(flag.name, is_flag=True, help=flag.help)
    return click.option(
        flag.name,
        default=None if default == () else default,
        multiple=isinstance(default, tuple),
        metavar=flag.metavar,
        show_default=isinstance(default, str),
        callback=named if flag.is_file else None,
        help=flag.help,
    )


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where to compute and with how much; nothing of it changes a byte."""
    for option in (
        click.option(
            "--device-memory",
            metavar="SIZE",
            default=_LIMITS.device_memory,
            show_default=True,
            help="All buffers on the GPU together.",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            default=_LIMITS.memory,
            show_default=True,
            help="All buffers together; the program and about 1 KiB per tensor come on top.",
        ),
        click.option(
            "--workers",
            type=int,
            metavar="N",
            help="Threads, at most 256; if not given one per core, up to 16, or 8 with CUDA.",
        ),
        click.option(
            "--device",
            metavar="DEVICE",
            default="auto",
            show_default=True,
            help="auto, cpu, cuda or cuda:N.",
        ),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
