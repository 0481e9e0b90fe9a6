"""A run in its directory: new, or resumed where it was interrupted."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only

from pixelcnn_lit.config.build import check
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.config.quoting import setting
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.runs.saved import find_resume_checkpoint, last_checkpoint, lock, saved_settings, typed_settings
from pixelcnn_lit.runs.signals import Stopped


@dataclass(frozen=True)
class Run:
    """A run that is open: no other process trains in its directory.

    Args:
        start: the checkpoint that it is resumed from; None of a new one.
        settings: its own: those that were saved, where it is resumed.
    """

    directory: Path
    start: Path | None
    settings: dict[str, Any]


def train_in_a_run(
    train: Callable[..., None], ckpt: str | None, skip_completed: bool, settings: dict[str, Any]
) -> None:
    """Call `train` with a run and its settings: a new one, or one that is resumed; or do nothing where it is completed.

    Args:
        ckpt: to resume from: see `find_resume_checkpoint`.
        skip_completed: leave alone what has left its result, and resume what was interrupted.
    """
    if skip_completed and completed():
        return
    with open_run(ckpt, settings, or_anew=skip_completed) as run:
        check("", train, run.settings, known=["run"])
        train(run, **run.settings)


@contextmanager
def open_run(ckpt: str | None, settings: dict[str, Any], or_anew: bool) -> Iterator[Run]:
    """Open the run in the command's directory; where a signal ends it, print how to resume it.

    Args:
        ckpt: see `find_resume_checkpoint`. settings: of a new run.
        or_anew: resume if there is something to resume.
    """
    directory, typed = run_dir(), typed_settings()
    with lock(directory) if rank_zero_only.rank == 0 else nullcontext():  # pyright: ignore[reportFunctionMemberAccess]
        start = find_resume_checkpoint(directory, ckpt, or_anew)
        new = {"scheduler": None, **settings, "overrides": typed}
        run = Run(directory, start, saved_settings(directory, typed) if start else new)
        try:
            yield run
        except Stopped:
            print_resume_command(directory)
            raise


def completed() -> bool:
    """Return whether the very run that is typed has left its result. Raises UserError if another has."""
    directory, typed = run_dir(), typed_settings()
    if not (directory / "result.json").is_file():
        return False
    before = json.loads((directory / "result.json").read_bytes())["overrides"]
    if set(before) != set(typed):
        raise UserError(
            f"run_dir={relative(directory)}: completed with {shlex.join(before)}; type that, or another run_dir"
        )
    print(f"{relative(directory)}: completed before, left alone")
    return True


@rank_zero_only
def print_resume_command(directory: Path) -> None:
    if last_checkpoint(directory).is_file():
        module, run = f"pixelcnn_lit.{HydraConfig.get().job.config_name}", setting("run_dir", relative(directory))
        print("stopped; to resume, type:", shlex.join(["python", "-m", module, run, "ckpt=last"]))
    else:
        print("stopped; nothing was saved yet")
