"""Output on a terminal, in any encoding."""

import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.auto import tqdm


def print_what_can_be_printed() -> None:
    """Let what the encoding of a stream cannot hold be replaced, where it would end the program with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def progress(*iterable: Any, **own: object) -> "tqdm":
    """tqdm's bar, on stdout as Lightning's are, and none where that is no terminal."""
    from tqdm.auto import tqdm  # not above: a typo is answered without it

    return tqdm(*iterable, **{"file": sys.stdout, "disable": None, "leave": False, **own})
