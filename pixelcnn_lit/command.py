"""A Hydra main that answers a user's mistake with one line and exit code 1, and a signal with 130 or 143."""

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pixelcnn_lit.build import check
from pixelcnn_lit.checkpoints import write_text
from pixelcnn_lit.errors import explain
from pixelcnn_lit.machine import keep_freed_memory

_PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package; in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


class Stopped(SystemExit):
    """A signal ended the program; the exit code is the shell's: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int, frame: Any = None) -> None:
        super().__init__(128 + signum)


def _stop(signum: int, frame: Any) -> None:
    raise Stopped(signum)


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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


def command(config_name: str) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Decorate a function into the command that conf/<config_name>.yaml configures.

    The top-level keys of the config, as plain values, are the function's arguments; its annotations are their types.
    A job that fails leaves error.txt in its run directory. `debug=true` or HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
            job = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
                functools.wraps(function)(functools.partial(_run, function, debug))
            )
            try:
                # HYDRA_FULL_ERROR makes Hydra raise, not print and exit.
                with patch.dict(os.environ, HYDRA_FULL_ERROR="1"), _stopping_on_signals():
                    job()
            except Exception as error:
                line = explain(error)
                if debug or line is None:
                    raise
                sys.exit(f"error: {line}")

        return main

    return decorate


def run_dir() -> Path:
    """The directory of the job that runs: `run_dir`, or a numbered one inside it in a sweep."""
    return Path(HydraConfig.get().runtime.output_dir)


def shown(path: Path | str) -> str:
    """A path as it is printed: from the folder the user stands in."""
    return os.path.relpath(path)


def _run(function: Callable[..., None], debug: bool, cfg: DictConfig) -> None:
    (run_dir() / "error.txt").unlink(missing_ok=True)
    try:
        with open_dict(cfg):
            cfg.pop("run_dir", None)  # whose directory is made by now, and would be made again
        settings: dict[str, Any] = OmegaConf.to_container(  # pyright: ignore[reportAssignmentType]
            cfg, resolve=True, throw_on_missing=True
        )
        debug = settings.pop("debug", False) or debug
        check("", function, settings)
        keep_freed_memory()
        with _alone():
            function(**settings)
    except Exception as error:
        line = explain(error)
        with contextlib.suppress(OSError):
            write_text(run_dir() / "error.txt", line or repr(error))
        if debug or line is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # a fault of the program shows its traceback; a sweep goes on with its next job
        sys.exit(f"error: {line}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let a job of a sweep look like a run of its own.

    Lightning's DDP starts its processes with this one's command line: each would run the whole sweep again. And it
    leaves its marks in the environment and its process group open, for the next job to stumble over.
    """
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        yield
        return
    argv = [sys.argv[0], *config.overrides.task]
    with patch.object(sys, "argv", argv), patch.dict(os.environ), read_write(config):  # pyright: ignore
        config.run.dir = config.runtime.output_dir
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
