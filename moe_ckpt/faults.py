"""Failures of the machine, as errors that say so."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import EnvironmentFaultError, MoeCkptError, show

__all__ = ["cause_of", "environment_faults", "fault_of", "not_loaded"]

_AGAIN = "run the same command again"
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


@contextmanager
def environment_faults() -> Iterator[None]:
    """Turn failures of the machine into `EnvironmentFaultError`."""
    try:
        yield
    except MoeCkptError:
        raise
    except Exception as error:
        found = fault_of(error)
        if found is None:
            raise
        raise found from error


def fault_of(error: Exception) -> EnvironmentFaultError | None:
    """What to say of a failure of the machine; None if an exception is none.

    >>> fault_of(OSError(28, "No space left on device", "out")).problems
    ('out: No space left on device; mend this and run the same command again',)
    >>> fault_of(ValueError("ours"))
    """
    # Python loses the exception where there is no memory for it.
    is_lost = isinstance(error, SystemError) and "exception" in str(error)
    if isinstance(error, MemoryError) or is_lost:
        return EnvironmentFaultError(
            f"memory ran out; free some, or pass a smaller --memory, and {_AGAIN}"
        )
    if isinstance(error, OSError):
        name = f"{show(error.filename)}: " if error.filename else ""
        mend = "raise the limit (ulimit -n)" if error.errno in _TOO_MANY else "mend this"
        return EnvironmentFaultError(f"{name}{error.strerror or show(error)}; {mend} and {_AGAIN}")
    if isinstance(error, ImportError) and not (error.name or "").startswith("moe_ckpt"):
        return not_loaded((error.name or "a library").partition(".")[0], error)
    if isinstance(error, RuntimeError):
        return _of_a_library(error)
    return None


def not_loaded(name: str, error: Exception, before: str = "") -> EnvironmentFaultError:
    """What to say of a library that cannot be loaded; ``before`` is what was tried before it."""
    return EnvironmentFaultError(
        f"{before}{show(name)} cannot be loaded: {show(cause_of(error))}; free memory if there is "
        f"too little, or install it anew, and {_AGAIN}"
    )


def cause_of(error: Exception) -> BaseException:
    """Why a library cannot be loaded, as the system says it: libraries say it in many words."""
    cause: BaseException = error
    while isinstance(deeper := cause.__cause__ or cause.__context__, ImportError | OSError):
        cause = deeper
    return cause


def _of_a_library(error: RuntimeError) -> EnvironmentFaultError | None:
    """Of torch's errors, and of threads: none of them has a class of its own."""
    text = str(error)
    if "allocate memory" in text:
        return fault_of(MemoryError())
    if "start new thread" in text:
        return EnvironmentFaultError(
            "no thread can be started: this user or container may have no more (ulimit -u), or "
            f"memory ran out; pass a smaller --workers, or raise the limit, and {_AGAIN}"
        )
    if "CUDA" not in text:
        return None
    if "out of memory" in text:
        return EnvironmentFaultError(
            f"GPU memory ran out ({show(error)}); free some, or use --device cpu, and {_AGAIN}"
        )
    return EnvironmentFaultError(f"the GPU failed ({show(error)}); {_AGAIN}, or with --device cpu")
