"""Output on a terminal, in any encoding, or to a reader that may go away."""

import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.auto import tqdm


def print_what_can_be_printed() -> None:
    """Let what the encoding of a stream cannot hold be replaced, where it would end the program with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def print_for_whom_may_leave() -> None:
    """Let the program live on when the reader of its output is gone, as that of `| head` is: a training is not lost.

    For a process of its own: whoever holds the stdout of before can no longer print.
    """
    if type(sys.stdout) is io.TextIOWrapper:
        own = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
        sys.stdout = Lasting(sys.stdout.detach(), line_buffering=sys.stdout.line_buffering, **own)


class Lasting(io.TextIOWrapper):
    """A stream that drops what nobody reads."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            return self._drop()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> int:
        """Let all that follows go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return 0


def progress(*iterable: Any, **own: object) -> "tqdm":
    """tqdm's bar, on stdout as Lightning's are, and none where that is no terminal."""
    from tqdm.auto import tqdm  # not above: a typo is answered without it

    return tqdm(*iterable, **{"file": sys.stdout, "disable": None, "leave": False, **own})
