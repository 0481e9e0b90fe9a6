"""A command: its config is composed, checked and handed to its main; a mistake gets one line, a signal an exit code."""

import contextlib
import functools
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write

from pixelcnn_lit.config.build import check, check_parts
from pixelcnn_lit.config.errors import explain
from pixelcnn_lit.config.quoting import quoted, uninterpolated
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.memory import keep_freed_memory
from pixelcnn_lit.runs.run_dir import expanded, run_dir, start_clock, typed
from pixelcnn_lit.runs.saved import checkpoint_file
from pixelcnn_lit.runs.signals import raise_on_signals
from pixelcnn_lit.runs.terminal import print_what_can_be_printed

_PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package; in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
TRAINING = ("train", "train_classifier")  # commands whose `ckpt` is one to resume from


def run(name: str) -> None:
    """Run pixelcnn_lit.<name>.main with the settings that conf/<name>.yaml and the command line make.

    The top-level keys of the config, as plain values, are the arguments of `main`; its annotations are their types.
    The module is imported once the config is composed: see `launch`. A job that fails leaves error.txt in its run
    directory. `debug=true` or HYDRA_FULL_ERROR=1 shows the traceback.
    """
    start_clock()
    sys.argv[1:] = map(_with_home_in_quotes, sys.argv[1:])
    debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    job: Any = functools.partial(_job, name, debug)
    job.__module__ = f"pixelcnn_lit.{name}"  # by which Hydra names it
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
    try:
        # HYDRA_FULL_ERROR makes Hydra raise, not print and exit.
        with patch.dict(os.environ, HYDRA_FULL_ERROR="1"):
            main()
    except Exception as error:
        line = explain(error, functools.partial(_settings, name))
        if debug or line is None:
            raise
        sys.exit(f"error: {line}")


def _with_home_in_quotes(word: str) -> str:
    """key=~/DIRECTORY, which bash alone expands, and which Hydra's grammar has no word for, so that it is read."""
    key, _, value = word.partition("=")
    return f'{key}="{value}"' if value.startswith("~") and not set(value) & set(',"\\') else word


def _settings(name: str) -> Mapping[str, Any]:
    """All settings of a command, under the choices that were typed where these make sense."""
    first = [word.partition(",")[0] for word in sys.argv[1:]]  # of a sweep
    choices = [word for word in first if (CONF / word.partition("=")[0].partition("@")[0]).is_dir()]
    for asked in (choices, []):
        with contextlib.suppress(HydraException), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(name, asked))  # pyright: ignore[reportReturnType]
    return {}


def _job(name: str, debug: bool, cfg: DictConfig) -> None:
    print_what_can_be_printed()  # here, too: the workers of a sweep begin here
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        start_clock()
    _keep_paths_as_they_are()
    (run_dir() / "error.txt").unlink(missing_ok=True)
    try:
        _record(cfg)
        with open_dict(cfg):
            del cfg["run_dir"]  # whose directory is made by now, and would be made again
        if name not in TRAINING:  # whose checkpoint was looked for as the config was composed
            _look_for_checkpoints(cfg)
        settings: dict[str, Any] = OmegaConf.to_container(  # pyright: ignore[reportAssignmentType]
            cfg, resolve=True, throw_on_missing=True
        )
        settings = {key: expanded(value) for key, value in settings.items()}
        debug = settings.pop("debug", False) or debug
        with _importing():
            check_parts(settings)
            main = _imported(name).main
        check("", main, settings)
        keep_freed_memory()
        with _alone(), raise_on_signals():
            if not debug:
                os.environ.pop("HYDRA_FULL_ERROR", None)  # the processes that Lightning starts read it, too
            main(**settings)
    except Exception as error:
        line = explain(error)
        with contextlib.suppress(OSError):
            atomic_write_text(run_dir() / "error.txt", line or repr(error))
        if debug or line is None or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # a fault of the program shows its traceback; a sweep goes on with its next job
        sys.exit(f"error: {line}")


def _look_for_checkpoints(cfg: DictConfig) -> None:
    for key in ("ckpt", "classifier_ckpt"):
        ckpt = MISSING if OmegaConf.is_missing(cfg, key) else cfg.get(key)
        if isinstance(ckpt, str):
            checkpoint_file(expanded(ckpt), key)


def _keep_paths_as_they_are() -> None:
    """Let a ${ in the paths that Hydra tells be read as it is: Hydra sets them as if they held interpolations."""
    runtime: Any = HydraConfig.get().runtime
    paths: Any = OmegaConf.to_container(runtime, resolve=False)
    with read_write(runtime):
        for key in ("cwd", "output_dir"):
            runtime[key] = uninterpolated(paths[key])


def _record(cfg: DictConfig) -> None:
    """Leave what was typed and what was composed in the run's directory, where a process is the first of a job's."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        parts = {"config": cfg, "hydra": {"hydra": HydraConfig.get()}, "overrides": typed()}
        for name, content in parts.items():
            atomic_write_text(
                run_dir() / "hydra" / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)).rstrip()
            )


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Leave garbage for later: looking for it, of which imports make little, takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _imported(name: str) -> Any:
    """The module of a command; of a package the one that `python -m` runs."""
    module = importlib.import_module(f"pixelcnn_lit.{name}")
    return importlib.import_module(f"pixelcnn_lit.{name}.__main__") if hasattr(module, "__path__") else module


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let a job of a sweep look like a run of its own, and put the environment back after any job.

    Lightning's DDP starts its processes with this one's command line: each would run the whole sweep again. And it
    leaves its marks in the environment and its process group open, for the next job to stumble over.
    """
    config: Any = HydraConfig.get()
    with read_write(config):  # Lightning sets double quotes around it, and hands it to those processes
        config.run.dir = uninterpolated(quoted(uninterpolated(str(run_dir())))[1:-1])
    sweep = config.mode == RunMode.MULTIRUN
    argv = [sys.argv[0], *typed()] if sweep else sys.argv
    with patch.object(sys, "argv", argv), patch.dict(os.environ):
        try:
            yield
        finally:
            import torch.distributed

            if sweep and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
