"""A command: its config is composed, checked and handed to its main; a mistake gets one line, a signal an exit code."""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pixelcnn_lit import runs  # noqa: F401 (its resolvers)
from pixelcnn_lit.build import check
from pixelcnn_lit.errors import explain
from pixelcnn_lit.files import write_text
from pixelcnn_lit.memory import keep_freed_memory
from pixelcnn_lit.run_dir import run_dir
from pixelcnn_lit.signals import raise_on_signals

_PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package; in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


def run(name: str) -> None:
    """Run pixelcnn_lit.<name>.main with the settings that conf/<name>.yaml and the command line make.

    The top-level keys of the config, as plain values, are the arguments of `main`; its annotations are their types.
    The module is imported once the config is composed: see `launch`. A job that fails leaves error.txt in its run
    directory. `debug=true` or HYDRA_FULL_ERROR=1 shows the traceback.
    """
    debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    job: Any = functools.partial(_job, name, debug)
    job.__module__ = f"pixelcnn_lit.{name}"  # by which Hydra names it
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
    try:
        # HYDRA_FULL_ERROR makes Hydra raise, not print and exit.
        with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):
            main()
    except Exception as error:
        line = explain(error)
        if debug or line is None:
            raise
        sys.exit(f"error: {line}")


def _job(name: str, debug: bool, cfg: DictConfig) -> None:
    (run_dir() / "error.txt").unlink(missing_ok=True)
    try:
        with open_dict(cfg):
            cfg.pop("run_dir", None)  # whose directory is made by now, and would be made again
        settings: dict[str, Any] = OmegaConf.to_container(  # pyright: ignore[reportAssignmentType]
            cfg, resolve=True, throw_on_missing=True
        )
        debug = settings.pop("debug", False) or debug
        main = _imported(name).main
        check("", main, settings)
        keep_freed_memory()
        with _alone(), raise_on_signals():
            main(**settings)
    except Exception as error:
        line = explain(error)
        with contextlib.suppress(OSError):
            write_text(run_dir() / "error.txt", line or repr(error))
        if debug or line is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # a fault of the program shows its traceback; a sweep goes on with its next job
        sys.exit(f"error: {line}")


def _imported(name: str) -> Any:
    """The module of a command; of a package the one that `python -m` runs."""
    module = importlib.import_module(f"pixelcnn_lit.{name}")
    return importlib.import_module(f"pixelcnn_lit.{name}.__main__") if hasattr(module, "__path__") else module


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
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
