"""The directory that a command writes into."""

import contextlib
import itertools
import os
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def run_dir() -> Path:
    """The directory of the job that runs: `run_dir`, or a numbered one inside it in a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def new_dir(parent: str) -> str:
    """A directory inside `parent` that nobody else has, named after the time."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for path in (f"{parent}/{name}{suffix}" for suffix in itertools.chain([""], map("_{}".format, itertools.count(2)))):
        with contextlib.suppress(FileExistsError):
            Path(path).mkdir()
            return path
    raise AssertionError("unreachable")


OmegaConf.register_new_resolver("new_dir", new_dir, use_cache=True, replace=True)


def shown(path: Path | str) -> str:
    """A path as it is printed: from the folder the user stands in."""
    return os.path.relpath(path)
