"""Output on a terminal, in any encoding, or to a reader that may go away."""

import errno
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


def survive_closed_pipes() -> None:
    """Let the program live on when the reader of its output is gone, as that of `| head` is: a training is not lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            same = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, PipeSafe(stream.buffer, **same))


class PipeSafe(io.TextIOWrapper):
    """A stream that drops what nobody reads."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            return self._drop(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> int:
        """Let all that follows go nowhere. Raises any other error than that of a closed pipe."""
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # the second on Windows
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return 0


def progress(*iterable: Any, **own: object) -> "tqdm":
    """tqdm's bar, on stdout as Lightning's are, and none where that is no terminal."""
    from tqdm.auto import tqdm  # not above: a typo is answered without it

    return tqdm(*iterable, **{"file": sys.stdout, "disable": None, "leave": False, **own})
