"""A command: its config is composed, checked and handed to its main; a mistake gets one line, a signal an exit code."""

import contextlib
import functools
import gc
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write

from pixelcnn_lit.config.build import check, check_parts
from pixelcnn_lit.config.errors import UserError, explain, group_and_choice
from pixelcnn_lit.config.quoting import quoted, uninterpolated
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.help import page
from pixelcnn_lit.runs.memory import keep_freed_memory
from pixelcnn_lit.runs.places import CONF
from pixelcnn_lit.runs.run_dir import expanded, relative, run_dir, start_clock, typed
from pixelcnn_lit.runs.saved import CONFIG, checkpoint_file, with_dataset_of_run
from pixelcnn_lit.runs.signals import raise_on_signals
from pixelcnn_lit.runs.sweep import sweep_directory
from pixelcnn_lit.runs.terminal import print_what_can_be_printed

# What Hydra prints for --help, a string.Template: see conf/job.yaml.
OmegaConf.register_new_resolver(
    "help_page", lambda name, *, _root_: page(name, _root_).replace("$", "$$"), replace=True
)

TRAINING = ("train", "train_classifier")  # commands whose `ckpt` is one to resume from
# Where it is 1, Hydra raises what it would print, and a process that Lightning starts takes it for debug=true.
FULL_ERROR = "HYDRA_FULL_ERROR"


def run(name: str) -> None:
    """Run pixelcnn_lit.<name>.main with the settings that conf/<name>.yaml and the command line make.

    The top-level keys of the config, as plain values, are the arguments of `main`; its annotations are their types.
    The module is imported once the config is composed: see `launch`. A job that fails leaves error.txt in its run
    directory. `debug=true` or HYDRA_FULL_ERROR=1 shows the traceback.
    """
    start_clock()
    sys.argv[1:] = [_home_in_quotes(word) for word in sys.argv[1:]]
    debug = "debug=true" in sys.argv or os.environ.get(FULL_ERROR) == "1"
    job: Any = functools.partial(_job, name, debug)  # which the launcher of a sweep can send to another process
    job.__module__ = f"pixelcnn_lit.{name}"  # from which Hydra takes the name of the job
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
    try:
        _refuse_options(sys.argv[1:])
        if name in TRAINING:
            sys.argv[1:] = with_dataset_of_run(sys.argv[1:])
        with patch.dict(os.environ, {FULL_ERROR: "1"}):
            main()
    except Exception as error:
        _end_sweep(name)
        if isinstance(error, MissingConfigException):
            _list_options(error)
        line = explain(error, functools.partial(_settings, name))
        if debug or line is None:
            raise
        sys.exit(f"error: {line}")
    _end_sweep(name)


def _list_options(error: MissingConfigException) -> None:
    """Let an error about a choice know all options of its group, also those in folders inside it."""
    group, choice = group_and_choice(error)
    within = [path.relative_to(CONF / group).with_suffix("") for path in (CONF / group).rglob("*.yaml")]
    elsewhere: Any = (error.options or []) if "/" not in choice else []  # those of plugins, or of --config-dir
    error.options = sorted({*(path.as_posix() for path in within), *elsewhere})


def _refuse_options(words: list[str]) -> None:
    """Raise UserError where one is an option that Hydra does not know: it would print a page of those that it does."""
    _, unknown = get_args_parser().parse_known_args(words)
    if unknown and unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]}: no such option; type settings as key=value (--help lists them)")
    if unknown:
        raise UserError(f"{unknown[0]}: an option stands between this and other settings; type options first")


def _end_sweep(name: str) -> None:
    """Print the table of a sweep of training runs, if this was one."""
    directory = sweep_directory()
    if directory and name in TRAINING and any(directory.glob("*/hydra")):
        again = shlex.join(["python", "-m", "pixelcnn_lit.summarize", relative(directory)])
        print(f"\nall runs of the sweep: {relative(directory)} (to print this table again: {again})")
        with contextlib.suppress(OSError, ValueError):  # the runs themselves have said what failed
            _imported("summarize").summarize(directory)


def _home_in_quotes(word: str) -> str:
    """Put quotes around the value of key=~/DIRECTORY: Hydra's grammar knows no ~, and bash alone expands it."""
    key, _, value = word.partition("=")
    needs_more = any(character in value for character in ',"\\')  # a list, or quotes of its own
    return f'{key}="{value}"' if value.startswith("~") and not needs_more else word


def _settings(name: str) -> Mapping[str, Any]:
    """Return all settings of a command, under the choices that were typed, or its own where these do not compose."""
    first = [word.partition(",")[0] for word in sys.argv[1:]]  # of each list of a sweep
    choices = [word for word in first if _is_group(word.partition("=")[0].partition("@")[0])]
    return _composed(name, choices) or _composed(name, []) or {}


def _is_group(key: str) -> bool:
    return bool(key) and (CONF / key).is_dir()


def _composed(name: str, choices: list[str]) -> Any:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(name, choices))
    except HydraException:
        return None


def _job(name: str, debug: bool, cfg: DictConfig) -> float | None:
    """Check a composed config, and hand it to the command's main, whose score, if any, a sweeper may follow."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    print_what_can_be_printed()  # here, too: the workers of a sweep begin here
    if sweep:
        start_clock()
    _keep_paths_as_they_are()
    if name not in TRAINING and (run_dir() / CONFIG).is_file():
        raise UserError(f"run_dir={relative(run_dir())}: holds a training run; type another directory, or leave it out")
    (run_dir() / "error.txt").unlink(missing_ok=True)
    try:
        _record(cfg)
        settings = _plain_settings(name, cfg)
        debug = settings.pop("debug", False) or debug
        with _importing():
            check_parts(settings)
            main = _imported(name).main
        check("", main, settings)
        keep_freed_memory()
        with _alone(sweep, debug), raise_on_signals():
            return main(**settings)
    except Exception as error:
        line = explain(error)
        with contextlib.suppress(OSError):
            atomic_write_text(run_dir() / "error.txt", line or repr(error))
        if sweep:
            raise  # Hydra continues with the next job, which it would not after sys.exit
        if debug or line is None:
            raise  # a fault of the program shows its traceback
        sys.exit(f"error: {line}")


def _plain_settings(name: str, cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values. Raises UserError where a checkpoint that they name is not there."""
    with open_dict(cfg):
        del cfg["run_dir"]  # which is made by now: resolved once more, it would be another one
        cfg.pop("run_name", None)  # is in it
    if name not in TRAINING:  # where the run of a checkpoint was looked for to compose run_dir
        _look_for_checkpoints(cfg)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {key: expanded(value) for key, value in resolved.items()}


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
def _alone(sweep: bool, debug: bool) -> Iterator[None]:
    """Let a job of a sweep look like a run of its own, and put the environment back after any job.

    Lightning's DDP starts its processes with this one's command line: each would run the whole sweep again. And it
    leaves its marks in the environment and its process group open, for the next job to stumble over.
    """
    _tell_processes_the_directory()
    argv = [sys.argv[0], *typed()] if sweep else sys.argv
    with patch.object(sys, "argv", argv), patch.dict(os.environ):
        if not debug:
            os.environ.pop(FULL_ERROR, None)
        try:
            yield
        finally:
            if sweep:
                _close_process_group()


def _tell_processes_the_directory() -> None:
    """Let the processes that Lightning starts have this one's directory, whatever its name.

    Lightning reads hydra.run.dir, resolved, puts double quotes around it, and writes it on their command lines.
    """
    config: Any = HydraConfig.get()
    as_composed = uninterpolated(str(run_dir()))  # by those processes
    as_typed = quoted(as_composed)[1:-1]
    with read_write(config):
        config.run.dir = uninterpolated(as_typed)


def _close_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
