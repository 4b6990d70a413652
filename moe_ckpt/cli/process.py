"""The command as a process: signals, errors, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from ..errors import EnvironmentFaultError, InterruptedConversionError, MoeCkptError, show
from ..faults import fault_of
from .signals import SIGNALS, ignore_signals
from .terminal import close_stdout, print_error

__all__ = ["main", "run"]

_SHOWN_PROBLEMS = 20


def main() -> NoReturn:
    """Run the command line and exit with the code that the error tree documents."""
    # numba imports it to look for a BLAS that no kernel uses, which takes longer than all of ours.
    sys.modules.setdefault("scipy", None)  # type: ignore[arg-type]
    # numpy's BLAS, which no kernel uses either, starts a thread per core, and there may be none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants hangups ignored
            signal.signal(number, _terminate)
    from .commands import cli

    code = run(cli)
    ignore_signals()
    sys.exit(code)


def run(command: Callable[..., Any]) -> int:
    """Run a command, print what went wrong, and return the exit code."""
    try:
        command(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        return _fail(InterruptedConversionError())
    except MoeCkptError as error:
        ignore_signals()
        return _fail(error)
    except (BrokenPipeError, SystemExit):  # click makes the second of the first
        close_stdout()  # who reads it has enough
        return 0
    except OSError as error:
        if error.filename is None:
            close_stdout()
        where = show(error.filename or "standard output")
        return _fail(EnvironmentFaultError(f"{where}: {error.strerror}"))
    except MemoryError:
        return _fail(EnvironmentFaultError("memory ran out; free some and run again"))
    except Exception as error:  # noqa: BLE001  any other exception is a bug to report
        if fault := fault_of(error):
            return _fail(fault)
        print_error(f"this is a bug in moe-ckpt; please report it with {_log_of(error)}")
        return 1


def _log_of(error: Exception) -> str:
    """Where the traceback is, or where the error comes from if it can be written nowhere."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="moe-ckpt-", suffix=".log", delete=False
        ) as log:
            log.write("".join(traceback.format_exception(error)))
    except OSError:
        *_, last = traceback.extract_tb(error.__traceback__)
        return f"{last.filename}, line {last.lineno}: {show(repr(error))}"
    return f"the log {log.name}"


def _fail(error: MoeCkptError) -> int:
    for problem in error.problems[:_SHOWN_PROBLEMS]:
        print_error(problem)
    rest = len(error.problems) + error.more - _SHOWN_PROBLEMS
    if rest > 0:
        print_error(f"and {rest} more problems of this kind")
    return error.exit_code


def _terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    raise InterruptedConversionError(128 + signum)
