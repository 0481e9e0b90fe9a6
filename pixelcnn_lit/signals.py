"""SIGINT, SIGTERM and SIGUSR1: a handler notes them or ends the program, and does nothing else.

What locks, writes or logs in a handler can wait for ever for a lock that the interrupted code holds.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# SIGUSR1 is how Slurm says that the time is nearly over. No system but Unix has it.
HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_noted = 0


class Stopped(SystemExit):
    """A signal ended the program; the exit code is the shell's: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def noted() -> int:
    """The number of the signal that asks the program to stop; 0 if there was none."""
    return _noted


def exit_on_signals() -> None:
    """End the program at once, without a word: for the start, when an exception may strike inside an import."""
    _handle_with(_exit)


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Let a signal raise Stopped where it strikes; a second one ends the program at once."""
    with _handling_with(_raise):
        yield


@contextlib.contextmanager
def note_signals() -> Iterator[None]:
    """Let a signal be `noted`, for code that asks; a second one ends the program at once."""
    with _handling_with(_note):
        yield


def _exit(signum: int, frame: FrameType | None) -> None:
    os._exit(128 + signum)


def _note(signum: int, frame: FrameType | None) -> None:
    global _noted
    if _noted:  # somebody is in a hurry
        _exit(signum, frame)
    _noted = signum


def _raise(signum: int, frame: FrameType | None) -> None:
    _note(signum, frame)
    raise Stopped(signum)


def _handle_with(handler: Any) -> dict[int, Any]:
    """Returns the handlers of before. Only the main thread of a process may have handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, handler) for signum in HANDLED}


@contextlib.contextmanager
def _handling_with(handler: Any) -> Iterator[None]:
    global _noted
    before = _handle_with(handler)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _noted = 0
