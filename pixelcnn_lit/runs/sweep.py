"""Where a sweep lies, for the table at its end: Hydra tells its callbacks alone."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

_directories: list[Path] = []  # of the sweep that this process runs, if it does


class NoteDirectory(Callback):
    """Notes the directory of a sweep when it begins."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        _directories.append(Path(config.hydra.sweep.dir))


def sweep_directory() -> Path | None:
    """Return the directory of the sweep that this process has begun, once."""
    return _directories.pop() if _directories else None
