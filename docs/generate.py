"""Write docs/cli.md from the commands themselves, so that the two cannot disagree."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from moe_ckpt.cli.commands import cli

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# Command line

<!-- Written by docs/generate.py from the commands. Do not edit. -->

Results for people go to stderr. `--json` documents and the tables of `moe-ckpt formats` and
`moe-ckpt layouts` go to stdout. [File formats](file-formats.md) describes the documents.

`--version` prints the version. `-h` or `--help` works after every command.
"""

EXIT_CODES = {
    "0": "Done. `verify`: nothing is wrong.",
    "1": "A bug in moe-ckpt. The message names a log file to report.",
    "2": "Wrong usage: an unknown option, or options that contradict each other.",
    "3": "Bad input: a checkpoint, configuration, statistics file or recipe that cannot be used.",
    "4": "The output folder was refused: it holds other files, or another conversion.",
    "5": "The machine failed: disk, memory, threads, rights or GPU. Run the same command again.",
    "6": "`verify` found something wrong, or `convert` did when it checked its own result.",
    "7": "`verify` found nothing wrong, and tensors that it does not know how to check.",
    "129": "Stopped by SIGHUP. Run the same command again.",
    "130": "Stopped by Ctrl-C. Run the same command again.",
    "143": "Stopped by SIGTERM. Run the same command again.",
}

TAIL = """\
## Memory

`--memory` bounds the buffers that weights pass through, all threads together. Some memory comes on
top of it:

- the program itself: Python, numba and, where they are used, torch and CUDA;
- the plan: about 1 KiB for each tensor of the output. It grows with the number of tensors, not
  with their size. For a 1.43 TB model the estimate is 491 MB: 256 MiB of buffers and the plan;
- one expert that is stored transposed, if it is larger than `--memory`. It has to be complete
  before any of it can be written.

`--dry-run` prints the estimate, which leaves out only the program itself. `--device-memory` bounds
the buffers on the GPU. If the GPU has less memory to give, batches are halved until they fit.

Pages that will not be read again are dropped from the system's page cache, so that a large
checkpoint does not drive out everything else.

## Sizes

Sizes are numbers of bytes with an optional unit: `5GB` is decimal, `512MiB` is binary.
"""


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *_commands(), *_exit_codes(), TAIL])


def _commands() -> Iterator[str]:
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=f"moe-ckpt {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"## {name}\n"
        yield f"```text\nmoe-ckpt {name} {usage}\n```\n"
        yield f"{_prose(command.help or '')}\n"
        yield from _options(command, context)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    yield "| option | meaning | default |"
    yield "|---|---|---|"
    for option in command.params:
        record = option.get_help_record(context)
        if record is None or isinstance(option, click.Argument):  # the text names arguments
            continue
        names, text = record
        found = re.fullmatch(r"(.*?)(?:  \[(.*)\])?", text)
        assert found is not None
        default, notes = "", []
        for note in (found[2] or "").split("; "):
            if note.startswith("default: "):
                default = f"`{note.removeprefix('default: ')}`"
            elif note:
                notes.append(note)
        more = f" ({', '.join(notes)})" if notes else ""
        # A bar would end the cell, and readers differ on how it is escaped in code.
        cell = f"<code>{names.replace('|', '&#124;')}</code>" if "|" in names else f"`{names}`"
        yield f"| {cell} | {_prose(found[1])}{more} | {default} |"
    yield ""


def _exit_codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield "| code | meaning |"
    yield "|---|---|"
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |"
    yield ""


def _prose(text: str) -> str:
    """Help text as Markdown: paragraphs stay, options are set as code."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", inspect.cleandoc(text))


if __name__ == "__main__":
    PAGE.write_text(page())
