"""The command, and ``python -m moe_ckpt``."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants hangups ignored
            signal.signal(number, _leave)
    # Imports take a moment, in which an interrupt must not print a traceback.
    from .cli.process import main as run

    run()


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    os._exit(128 + signum)  # nothing is begun yet


if __name__ == "__main__":
    main()
