"""Files that are whole or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pixelcnn_lit.config.errors import DISK_FULL

UNFINISHED = ".tmp-"  # how the name of a file begins while it is written


@contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """A file to write in the place of `target`: beside it, flushed to the disk, renamed.

    A kill at any moment leaves the earlier file as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{UNFINISHED}{os.getpid()}-{target.name}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        full = error.filename is None and error.errno in DISK_FULL
        if full or str(error.filename) == str(unfinished):
            error.filename = str(target)  # what was asked for, and not where it is written first
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write_text(target: Path, text: str) -> None:
    """`text` and a newline as the file `target`, whole or not at all."""
    with atomic_write(target) as file:
        file.write(f"{text}\n".encode(errors="backslashreplace"))  # a path may hold bytes that are no text


def second_name(file: Path, name: Path) -> None:
    """Let `file` be found under another `name`, too, whatever had it before: a link, or where there are none a copy."""
    if name.exists() and name.samefile(file):
        return
    unfinished = name.with_name(f"{UNFINISHED}{os.getpid()}-{name.name}")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(file, unfinished)
        os.replace(unfinished, name)
    except OSError:
        unfinished.unlink(missing_ok=True)  # as a link to `file` it would be written through
        with open(file, "rb") as content, atomic_write(name) as copy:
            shutil.copyfileobj(content, copy)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_partial_files(directory: Path) -> None:
    """Remove what a killed run left unfinished."""
    for stale in directory.glob(f"{UNFINISHED}*"):
        stale.unlink()
