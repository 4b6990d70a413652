"""The errors a caller can meet, and the exit code each one means on the command line.

    MoeCkptError                      1   a bug of ours, if raised bare
    +-- UsageError                    2   options that contradict each other
    +-- InputError                    3   a bad or unsupported checkpoint, config or stats file
    |   +-- CheckpointError               files that are not what their headers or index say
    |   +-- LayoutError                   experts stored in a way that cannot be converted
    |   +-- FormatError                   sizes that the number format cannot hold
    |   +-- StatsError                    the activation statistics file
    |   +-- RecipeError                   the recipe
    |   +-- AmaxError                     the file of weight amax
    +-- OutputRefusedError            4   the output folder is not ours to write
    +-- EnvironmentFaultError         5   disk, memory, I/O or GPU: fix it and run again
    +-- VerifyError                   6   a checkpoint that is not what it must be
    +-- UncheckedError                7   a checkpoint of a form that verification does not read
    +-- InterruptedConversionError    130, 143 after SIGTERM, 129 after SIGHUP

An error holds one line per problem. Checks that run before anything is written report every
problem they find, so one run is enough to see them all; of thousands it holds the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = [
    "AmaxError",
    "CheckpointError",
    "EnvironmentFaultError",
    "FormatError",
    "InputError",
    "InterruptedConversionError",
    "LayoutError",
    "MoeCkptError",
    "OutputRefusedError",
    "RecipeError",
    "StatsError",
    "UncheckedError",
    "UsageError",
    "VerifyError",
    "printable",
    "show",
]

T = TypeVar("T")

_SHOWN_LENGTH = 200
_LINE_LENGTH = 1000
_KEPT_PROBLEMS = 1000


class MoeCkptError(Exception):
    """Base of all errors raised on purpose.

    ``problems`` holds one line for each, safe to print; ``more`` counts those that it leaves out.
    """

    exit_code = 1
    more = 0

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_cut(printable(problem), _LINE_LENGTH) for problem in problems)
        super().__init__("\n".join(self.problems))


class UsageError(MoeCkptError):
    """Options that contradict each other or the request."""

    exit_code = 2


class InputError(MoeCkptError):
    """Something in the input that cannot be converted."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint file that is damaged, incomplete or contradicts another."""


class LayoutError(InputError):
    """Experts that are unknown, incomplete or ambiguous."""


class FormatError(InputError):
    """A matrix whose sizes the chosen number format cannot hold."""


class StatsError(InputError):
    """An activation statistics file that is invalid or does not fit the model."""


class RecipeError(InputError):
    """A recipe that is invalid or does not fit the model."""


class AmaxError(InputError):
    """A file of weight amax that is invalid or belongs to another checkpoint."""


class OutputRefusedError(MoeCkptError):
    """An output folder that holds foreign files or overlaps the input."""

    exit_code = 4


class EnvironmentFaultError(MoeCkptError):
    """The machine failed: disk space, permissions, I/O, memory, threads, libraries or GPU."""

    exit_code = 5


class VerifyError(MoeCkptError):
    """A checkpoint in which a verification found something wrong."""

    exit_code = 6


class UncheckedError(MoeCkptError):
    """A checkpoint of which nothing is known to be wrong, and not all can be checked."""

    exit_code = 7


class InterruptedConversionError(MoeCkptError):
    """Stopped by SIGINT (130), SIGTERM (143) or SIGHUP (129)."""

    def __init__(self, exit_code: int = 130) -> None:
        super().__init__("interrupted; run the same command again")
        self.exit_code = exit_code


class Problems:
    """Collects problems so that one error can report them all.

    >>> problems = Problems()
    >>> problems.add(LayoutError, "first")
    >>> problems.add(LayoutError, "second")
    >>> problems.check()
    Traceback (most recent call last):
    moe_ckpt.errors.LayoutError: first
    second
    """

    def __init__(self) -> None:
        self._found: list[tuple[type[InputError], str]] = []
        self._more = 0

    def add(self, kind: type[InputError], problem: str) -> None:
        """Record one problem; it is raised by `check`."""
        if len(self._found) < _KEPT_PROBLEMS:
            self._found.append((kind, problem))
        else:
            self._more += 1

    def absorb(self, error: InputError) -> None:
        """Record all problems of an error that another check raised."""
        for problem in error.problems:
            self.add(type(error), problem)
        self._more += error.more

    def catch(self, check: Callable[[], T]) -> T | None:
        """What a check returns; None if it raised, and then its problems are recorded."""
        try:
            return check()
        except InputError as error:
            self.absorb(error)
            return None

    def check(self) -> None:
        """Raise what was recorded: the common class of all problems, or `InputError`."""
        if not self._found:
            return
        kinds = {kind for kind, _ in self._found}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        error = kind(*(problem for _, problem in self._found))
        error.more = self._more
        raise error


def printable(text: str) -> str:
    r"""Text with its control characters escaped, those of line breaks and directions too.

    >>> printable("a\tb")
    'a\\tb'
    """
    if text.isprintable():  # nearly all are, and there are many
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(name: object) -> str:
    """A name from a file, safe to print: control characters escaped, at most 200 characters."""
    return _cut(printable(str(name)[: _SHOWN_LENGTH + 1]), _SHOWN_LENGTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def show_some(names: Iterable[object], limit: int = 3) -> str:
    """The first few names and how many more there are.

    >>> show_some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    listed = [show(name) for name in names]
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
