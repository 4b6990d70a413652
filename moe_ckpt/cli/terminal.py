"""What is printed: documents to stdout, lines for people to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable

if TYPE_CHECKING:
    from ..plan import Plan

__all__ = ["close_stdout", "print_error", "print_json", "say", "say_notes"]


def print_error(message: str) -> None:
    """Print an error."""
    say([f"moe-ckpt: error: {message}"])


def say(lines: Iterable[str]) -> None:
    """Write to stderr if it can be written to: hours of work do not depend on it."""
    with suppress(OSError, ValueError):
        for line in lines:
            click.echo(printable(line), err=True)


def say_notes(plan: Plan, quiet: bool) -> None:
    """Print notes and warnings of a plan; warnings only if ``quiet``."""
    if not quiet:
        say(f"moe-ckpt: note: {note}" for note in plan.notes)
    say(f"moe-ckpt: warning: {warning}" for warning in plan.warnings)


def print_json(document: dict[str, Any]) -> None:
    """Print a document to stdout, or what of it the reader wants."""
    try:
        click.echo(json.dumps(document, indent=2))
    except BrokenPipeError:
        close_stdout()


def close_stdout() -> None:
    """Let what is still to be written to stdout go nowhere: the interpreter tries at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError, AttributeError):  # there may be none
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
