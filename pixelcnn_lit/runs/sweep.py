"""Where a sweep lies, for the table at its end: Hydra tells its callbacks alone."""

from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_directories: list[Path] = []  # of the sweep that this process runs, if it does


class NoteDirectory(Callback):
    """Notes the directory of a sweep when it begins."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        _directories.append(Path(config.hydra.sweep.dir))


def sweep_directory() -> Path | None:
    """Return the directory of the sweep that this process has begun, once."""
    return _directories.pop() if _directories else None
