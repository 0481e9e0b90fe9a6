"""A run in its directory: new, or resumed where it was interrupted."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only

from pixelcnn_lit.config.build import check
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.config.quoting import setting
from pixelcnn_lit.runs.atomic import second_name
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.runs.saved import (
    MAY_CHANGE_ON_RESUME,
    damage,
    find_resume_checkpoint,
    last_checkpoint,
    lock,
    saved_settings,
    typed_settings,
)
from pixelcnn_lit.runs.signals import Stopped


@dataclass(frozen=True)
class Run:
    """A run that is open: no other process trains in its directory.

    Args:
        start: the checkpoint that it is resumed from; None of a new one.
        settings: its own: those that were saved, where it is resumed.
        closing: what is to be done when it closes, however it ends.
    """

    directory: Path
    start: Path | None
    settings: dict[str, Any]
    closing: ExitStack = field(default_factory=ExitStack)


def train_in_a_run(
    train: Callable[..., dict[str, Any] | None],
    ckpt: str | None,
    skip_completed: bool,
    settings: dict[str, Any],
    score: str,
) -> float | None:
    """Call `train` with a run and its settings: a new one, or one that is resumed; or do nothing where it is completed.

    Returns the score of its result, for a sweeper to follow; None where it is not scored, or not by this process.

    Args:
        train: returns the result of a run, in the first of its processes.
        ckpt: to resume from: see `find_resume_checkpoint`.
        skip_completed: leave alone what has left its result, and resume what was interrupted.
    """
    if skip_completed and (before := completed_result()):
        return before.get(score)
    with open_run(ckpt, settings, or_anew=skip_completed) as run:
        check("", train, run.settings, known=["run"])
        result = train(run, **run.settings)
    return result.get(score) if result else None


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
        settings = saved_settings(directory, typed) if start else new
        last = last_checkpoint(directory)
        if start and start.resolve() != last.resolve() and (wrong := damage(last)):
            put_in_place(start, last, wrong)
        try:
            with ExitStack() as closing:
                yield Run(directory, start, settings, closing)
        except Stopped:
            print_resume_command(directory)
            raise


def completed_result() -> dict[str, Any] | None:
    """Return the result that the run that is typed has left, if any. Raises UserError if another run has.

    It may have been typed by its directory alone, and have been resumed with changes that a run may be resumed with.
    """
    directory, typed = run_dir(), typed_settings()
    if not (directory / "result.json").is_file():
        return None
    result = json.loads((directory / "result.json").read_bytes())
    more = set(result["overrides"]) - set(typed)
    changes = all(override.lstrip("+~").startswith(MAY_CHANGE_ON_RESUME) for override in more)  # when it was resumed
    if not set(typed) <= set(result["overrides"]) or not (changes or not typed):
        before = shlex.join(result["overrides"])
        raise UserError(
            f"run_dir={relative(directory)}: completed with {before}; type that, ckpt=last to extend it, or another "
            "run_dir"
        )
    print(f"{relative(directory)}: completed before, left alone")
    return result


@rank_zero_only
def put_in_place(before: Path, last: Path, wrong: str) -> None:
    """Replace a last checkpoint in which something is wrong, which is put aside, by one before it."""
    print(f"{relative(last)}: {wrong}; resumes from {relative(before)}")
    if last.is_file():
        os.replace(last, last.with_name("damaged.ckpt"))
    second_name(before, last)


@rank_zero_only
def print_resume_command(directory: Path) -> None:
    if last_checkpoint(directory).is_file():
        module, run = f"pixelcnn_lit.{HydraConfig.get().job.config_name}", setting("run_dir", relative(directory))
        print("stopped; to resume, type:", shlex.join(["python", "-m", module, run, "ckpt=last"]))
    else:
        print("stopped; nothing was saved yet")
