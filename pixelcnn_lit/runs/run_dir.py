"""The job that runs: the directory it writes into, what was typed, the time it has taken."""

import itertools
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pixelcnn_lit.config.errors import UserError


def run_dir() -> Path:
    """The directory of the job that runs: `run_dir`, or a numbered one inside it in a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def typed() -> list[str]:
    """Return what was typed for the job, word for word: Hydra's list of it would resolve what looks like ${...}."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # pyright: ignore


_began = time.perf_counter()


def start_clock() -> None:
    """A command begins, or a job of a sweep."""
    global _began
    _began = time.perf_counter()


def seconds_so_far() -> float:
    return time.perf_counter() - _began


def new_dir(parent: str) -> str:
    """Return the name of a directory inside `parent` that is nobody's: that of the time and of this process.

    It is made when the config has been composed, and not while it is.
    """
    name = f"{parent}/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


OmegaConf.register_new_resolver("new_dir", new_dir, use_cache=True, replace=True)


def relative(path: Path | str) -> str:
    """A path as it is printed: from the folder the user stands in. It can be typed, too, whatever its first name is."""
    path = os.path.relpath(path)
    return f"./{path}" if path.startswith(("~", "-")) or path == "???" else path


Value = TypeVar("Value")


def expanded(value: Value) -> Value:
    """A path that begins with ~, from the root on; anything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def directory(value: str | None) -> str:
    """The directory that `run_dir` names."""
    if value is None:
        raise UserError("run_dir=null: must be a directory; leave it out for a new one")
    return expanded(str(value))


OmegaConf.register_new_resolver("directory", directory, replace=True)


def plain_name(name: str) -> str:
    """A dataset's name as results carry it; where it is a path, as of npz files and folders, its last part."""
    return Path(name).name.removesuffix(".npz")
