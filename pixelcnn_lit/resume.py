"""What lets a run that was cut off go on as if nothing had happened: `run_dir=R ckpt=last`."""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from lightning.pytorch.callbacks import Callback, Checkpoint
from omegaconf import OmegaConf

from pixelcnn_lit.build import Range
from pixelcnn_lit.checkpoints import first_line, sweep
from pixelcnn_lit.command import Stopped, new_dir, shown
from pixelcnn_lit.errors import UserError

CONFIG = "config.yaml"  # beside the checkpoints: all settings of the run
CHANGEABLE = ("trainer", "callbacks")  # of them, when it goes on


def run_of(ckpt: str | None, parent: str) -> str:
    """The directory of the run that a checkpoint belongs to; a new one inside `parent` where there is no checkpoint."""
    if ckpt is None:
        return new_dir(parent)
    if ckpt == "last":
        raise UserError("ckpt=last: of which run? type run_dir=DIRECTORY too")
    directory = Path(str(ckpt)).parent.parent
    if not Path(str(ckpt)).is_file() or not (directory / CONFIG).is_file():
        raise UserError(f"ckpt={ckpt}: no checkpoint inside the directory of a run; type RUN_DIR/checkpoints/last.ckpt")
    return str(directory)


OmegaConf.register_new_resolver("run_of", run_of, use_cache=True, replace=True)


def last_checkpoint(directory: Path) -> Path:
    return directory / "checkpoints" / "last.ckpt"


def requeued(directory: Path) -> list[Path]:
    """What Lightning saved there when Slurm was about to end the job."""
    return list(directory.glob("hpc_ckpt_*.ckpt"))


def starting_point(directory: Path, ckpt: str | None, or_anew: bool) -> str | None:
    """The checkpoint to go on from in `directory`, or None to start; `or_anew` takes what there is."""
    last = last_checkpoint(directory)
    if ckpt is None:
        if not last.is_file() or requeued(directory):  # which Lightning takes up by itself
            return None
        if not or_anew and "SLURM_RESTART_COUNT" not in os.environ:
            raise UserError(f"run_dir={shown(directory)}: holds a run; type ckpt=last to go on, or another run_dir")
        return str(last)
    path = last if ckpt == "last" else Path(ckpt)
    if path.resolve().parent.parent != directory.resolve():
        raise UserError(f"ckpt={ckpt}: of another run; leave out run_dir, or type ckpt=last")
    return str(path)


def saved_settings(directory: Path, composed: dict[str, Any], typed: Sequence[str]) -> dict[str, Any]:
    """The settings saved in a run's directory, with what was `typed` of its trainer and callbacks changed in them.

    `composed` is what conf/ and the typed overrides make of it today. Raises UserError where they would change more.
    """
    path = directory / CONFIG
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        saved = {key: saved[key] for key in (*composed, "overrides")}
    except Exception as error:  # yaml and a stranger's contents have many
        raise UserError(
            f"{path}: damaged or not of this program ({first_line(error)}); it holds the settings"
        ) from error
    overrides = OverridesParser.create().parse_overrides(list(typed))
    own = [o for o in overrides if _group(o) not in ("run_dir", "ckpt", "skip_completed", "debug")]
    for override in own:
        if _group(override) not in CHANGEABLE:
            _refuse_changes(override, saved, composed)
    for override in own:
        group, _, inside = override.key_or_group.partition(".")
        if group in CHANGEABLE and not inside and not override.is_delete():
            saved[group] = composed[group]  # another choice, and in it all that was typed
        elif group in CHANGEABLE:
            _take_over(saved[group], composed[group], inside.split("."))
    return saved


def _group(override: Override) -> str:
    return override.key_or_group.partition(".")[0].partition("@")[0]


def _refuse_changes(override: Override, saved: dict[str, Any], composed: dict[str, Any]) -> None:
    """Raise UserError if an override, typed again when a run goes on, would not be what it was."""
    here, there, name = composed, saved, override.key_or_group
    for part in name.split("."):
        here, there = (node.get(part) if isinstance(node, dict) else None for node in (here, there))
    if here is None or isinstance(here, dict):  # a choice: of what, only the whole can tell
        for key in [key for key in composed if key not in CHANGEABLE]:
            _require_equal(key, saved[key], composed[key])
    else:
        _require_equal(name, there, here)


def _require_equal(key: str, saved: Any, composed: Any) -> None:
    if isinstance(saved, dict) and isinstance(composed, dict):
        for name in sorted({**saved, **composed}, key=lambda name: name != "_target_"):  # another choice is named first
            _require_equal(f"{key}.{name}", saved.get(name), composed.get(name))
    elif saved != composed:
        raise UserError(
            f"{key} is {saved} in the run and {composed} here; a run goes on with its own settings: "
            "type trainer.* and callbacks.* alone"
        )


def _take_over(saved: dict[str, Any], composed: dict[str, Any], names: list[str]) -> None:
    """Make the value at `names` in `saved` what it is in `composed`, where it may be absent."""
    name, *rest = names
    if name not in composed:
        saved.pop(name, None)
    elif rest and isinstance(saved.get(name), dict):
        _take_over(saved[name], composed[name], rest)
    else:
        saved[name] = composed[name]


class Streams(Callback):
    """Makes all chance within a training step a function of (seed, epoch, batch, rank), as the order of the data is.

    So a run that goes on needs no random state, whatever validation, sample grids or other processes drew meanwhile.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        key = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        (drawn,) = np.random.SeedSequence(key).generate_state(1)
        torch.manual_seed(int(drawn))  # of every device
        np.random.seed(drawn)  # noqa: NPY002 (the global stream is what other people's code draws from)
        random.seed(int(drawn))


class LastCheckpoint(Checkpoint):
    """Keeps the checkpoint from which a run goes on, bit for bit.

    It is written before each validation (so that a validation that is cut off is run again), every
    `every_n_minutes` or `every_n_steps` in between, and on SIGINT and SIGTERM, which then end the run with exit code
    130 or 143. All this happens between two optimizer steps and nowhere else.
    """

    def __init__(
        self, every_n_minutes: Annotated[float, Range(0)] = 10.0, every_n_steps: Annotated[int, Range(1)] | None = None
    ) -> None:
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.path = last_checkpoint(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._asked = 0  # the number of the signal that asked the run to stop
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            sweep(self.path.parent)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._batches(trainer).start = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)
            signal.signal(signal.SIGTERM, self._ask)  # under Slurm, too; SIGUSR1, at which it requeues, is Lightning's

    def _ask(self, signum: int, frame: Any) -> None:
        if self._asked:  # somebody is in a hurry
            raise Stopped(signum)
        self._asked = signum

    @staticmethod
    def _batches(trainer: L.Trainer) -> Any:
        return trainer.train_dataloader.batch_sampler  # pyright: ignore[reportOptionalMemberAccess]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._batches(trainer).start = 0
        # Of a run that goes on with a new epoch Lightning would otherwise skip or repeat parts of the old one.
        trainer.fit_loop.epoch_loop.restarting = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate() or trainer.should_stop:
            return  # gradients are in no checkpoint; a run that stops by itself is saved with its last score
        ends = _validation_is_due(trainer) or batch_idx + 1 == trainer.num_training_batches
        stop, late = self._agreed(trainer)
        if ends or late or stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            trainer.save_checkpoint(self.path)
            self._saved_at = time.monotonic()
        if stop:
            raise Stopped(stop)

    def _agreed(self, trainer: L.Trainer) -> tuple[int, bool]:
        """The signal that asks to stop, and whether it is time to save: the same answers in every process."""
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return self._asked, late
        if trainer.global_step % 10:  # agreeing takes time
            return 0, False
        answers = torch.tensor([self._asked, int(late)], device=trainer.strategy.root_device)
        asked, late = trainer.strategy.reduce(answers, reduce_op="max").tolist()  # pyright: ignore
        return asked, bool(late)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if self._asked and trainer.world_size == 1 and not trainer.should_stop:
            raise Stopped(self._asked)  # it was saved before this validation, which will be run again

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Lightning leaves ReduceLROnPlateau out of an epoch that was resumed, for want of a score; here there is one.
        trainer.fit_loop._restarting = False
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)
            if self._asked:
                raise Stopped(self._asked)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the loops' progress in one way, whichever hook saves: this batch is done, its validation is not."""
        batches, validation = trainer.num_training_batches, _validation_is_due(trainer)
        loops = checkpoint["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["current"]["processed"]
        epoch_over = done >= batches and not validation
        for counts in ("total", "current"):
            epochs, steps = loops["epoch_progress"][counts], loops["epoch_loop.batch_progress"][counts]
            whole = epochs["completed"] + epoch_over
            epochs.update(ready=whole + (not epoch_over), started=whole + (not epoch_over), processed=whole)
            epochs["completed"] = whole
            steps.update(dict.fromkeys(steps, steps["processed"]))
        if epoch_over:
            current = loops["epoch_loop.batch_progress"]["current"]
            current.update(dict.fromkeys(current, 0))
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        evaluated = loops["epoch_loop.val_loop.batch_progress"]
        for counts in ("total", "current"):
            evaluated[counts] = dict.fromkeys(evaluated[counts], 0)
        if validation:  # how Lightning recognises an evaluation that was cut off
            evaluated["total"].update(ready=1, started=1)
            evaluated["is_last_batch"] = False
        # The step that loggers write; it moves after validation.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - validation

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the paths of other callbacks follow a run directory that was moved."""
        here = str(self.path.parent)
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                there, state["dirpath"] = state["dirpath"], here
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = state[key].replace(there, here, 1)
                state["best_k_models"] = {k.replace(there, here, 1): v for k, v in state["best_k_models"].items()}


def _validation_is_due(trainer: L.Trainer) -> bool:
    """Whether validation follows the present batch anyhow: not because the run is about to stop."""
    stopping, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # pyright: ignore
    finally:
        trainer.should_stop = stopping
