"""SIGINT, SIGTERM and SIGUSR1: a handler ends the program, raises or takes a note, and does nothing else.

What locks, writes or logs inside a handler can wait for ever for a lock that the interrupted code holds.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Slurm sends SIGUSR1 before the time is over. Windows does not have it.
HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(SystemExit):
    """A signal ended the program; the exit code is the shell's: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def noted() -> int:
    """The number of the signal that asked the program to stop; 0 if none did."""
    return _noted


def stop_if_noted() -> None:
    """Raise Stopped if a signal was noted."""
    if _noted:
        raise Stopped(_noted)


def exit_on_signals() -> None:
    """From now on a signal ends the program at once: for imports, which may swallow or dress up an exception."""
    global _answer
    _answer = _exit
    _install()


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """A signal raises Stopped where it strikes, but see `note_signals`. Handlers are put back at the end."""
    global _answer, _noted
    handlers, answer = _install(), _answer
    _answer = _raise
    try:
        yield
    finally:
        _answer, _noted = answer, 0
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def note_signals() -> None:
    """Inside `raise_on_signals`, from now on: a signal is noted, for code that asks; a second SIGINT exits at once."""
    global _answer
    _answer = _note


@contextlib.contextmanager
def postpone_signals() -> Iterator[None]:
    """A signal is noted; where it would have raised Stopped, it does so at the end."""
    global _answer
    answer, _answer = _answer, _postpone
    try:
        yield
    finally:
        _answer = answer
    if answer is _raise:
        stop_if_noted()


def outlive_signals(worker: int = 0) -> None:
    """Let a worker process live on when all processes of a job get a signal, so that the run can be saved.

    After SIGTERM it lives for half a minute more: it is also how a worker is told to end that does not listen.
    """
    for signum in HANDLED:
        signal.signal(signum, _outlive)


def _outlive(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGTERM and hasattr(signal, "alarm"):
        signal.alarm(30)


def _exit(signum: int) -> None:
    os._exit(128 + signum)


def _raise(signum: int) -> None:
    _note(signum)
    raise Stopped(signum)


def _note(signum: int) -> None:
    if _noted and signum == signal.SIGINT:  # somebody is in a hurry, as Slurm is not when SIGTERM follows SIGUSR1
        _exit(signum)
    _postpone(signum)


def _postpone(signum: int) -> None:
    global _noted
    _noted = _noted or signum


_noted = 0
_answer: Callable[[int], None] = _exit


def _handle(signum: int, frame: FrameType | None) -> None:
    _answer(signum)


def _install() -> dict[int, Any]:
    """The handlers of before. Only the main thread can have any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, _handle) for signum in HANDLED}
