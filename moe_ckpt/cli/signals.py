"""The signals that end a command, and the moment from which none does."""

from __future__ import annotations

import signal

__all__ = ["SIGNALS", "ignore_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    """From now on nothing interrupts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
