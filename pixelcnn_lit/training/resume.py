"""What lets a run that was cut off end as if nothing had happened, bit for bit. Tried with Lightning 2.6."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.config.errors import first_line
from pixelcnn_lit.runs.atomic import sweep
from pixelcnn_lit.runs.saved import last_checkpoint
from pixelcnn_lit.runs.signals import Stopped, note_signals, noted


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
    `every_n_minutes` or `every_n_steps` in between, and on SIGINT, SIGTERM and SIGUSR1, which then end the run with
    exit code 130, 143 or 138. All this happens between two optimizer steps and nowhere else.

    A signal is noted when it strikes. It is obeyed after an optimizer step, or between two batches of an evaluation
    that a resumed run would repeat; several processes agree on it first. A sample grid is left unfinished where the
    first process got the signal, which draws it. At SIGUSR1, which Slurm sends before the time is over
    (`sbatch --signal=USR1@120`), the job is requeued.
    """

    def __init__(
        self, every_n_minutes: Annotated[float, Range(0)] = 10.0, every_n_steps: Annotated[int, Range(1)] | None = None
    ) -> None:
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.path = last_checkpoint(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._owed = False  # whether the epoch that ends is still to be saved
        self._safe = True  # whether all is saved: a run that goes on may begin with a validation
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            sweep(self.path.parent)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._batches(trainer).start = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        note_signals()

    @staticmethod
    def _batches(trainer: L.Trainer) -> Any:
        return trainer.train_dataloader.batch_sampler  # pyright: ignore[reportOptionalMemberAccess]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._batches(trainer).start = 0
        # Of a run that goes on with a new epoch Lightning would otherwise skip or repeat parts of the old one.
        trainer.fit_loop.epoch_loop.restarting = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._safe = False
        if trainer.fit_loop._should_accumulate() or _ends_by_itself(trainer):
            return  # gradients are in no checkpoint; a run that stops by itself is saved with its last score
        validation = _validation_is_due(trainer)
        stop, late = self._agreed(trainer)
        if batch_idx + 1 == trainer.num_training_batches and not validation:
            self._owed = True  # schedulers are still to be stepped
            return
        if validation or late or stop or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer)
        if stop:
            self._stop(trainer, stop)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self._owed, self._safe = time.monotonic(), False, True

    def _agreed(self, trainer: L.Trainer) -> tuple[int, bool]:
        """The signal that asks to stop, and whether it is time to save: the same answers in every process."""
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return noted(), late
        answers = torch.tensor([noted(), int(late)], device=trainer.strategy.root_device)
        asked, late = trainer.strategy.reduce(answers, reduce_op="max").tolist()  # pyright: ignore
        return asked, bool(late)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked, _ = self._agreed(trainer)
        if asked:
            self._stop(trainer, asked)

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        """End the run, whose last checkpoint is written."""
        if not trainer.is_global_zero:
            raise SystemExit  # with 0: at any other code Lightning kills the first process, which may not be done
        if signum == getattr(signal, "SIGUSR1", None):
            requeue()
        raise Stopped(signum)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Learn how many batches every process has, the last of which can be missing in some."""
        batches = [sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)]
        fewest = -torch.tensor(batches, device=trainer.strategy.root_device)
        self._common_batches = -int(trainer.strategy.reduce(fewest, reduce_op="max"))  # pyright: ignore

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._safe and batch_idx < self._common_batches:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._safe:
            self._stop_if_asked(trainer)  # a sample grid may have been left unfinished

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loop, validation = trainer.fit_loop, _validation_is_due(trainer)
        if _ends_by_itself(trainer) and validation:
            self._save(trainer)  # as before that validation, whose scheduler step follows it
        # Lightning steps ReduceLROnPlateau after the last hook that could save, and not in an epoch that was resumed.
        if loop.epoch_loop._num_ready_batches_reached():
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop._restarting = True  # so it does not do so again
        if (self._owed or _ends_by_itself(trainer)) and not validation:
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._stop_if_asked(trainer)  # the test is still to come

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
        """Let the paths of other callbacks follow a run directory that was moved; and none lead out of it."""
        here = self.path.parent
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                state["dirpath"] = str(here)
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = state[key] and str(here / Path(state[key]).name)
                state["best_k_models"] = {str(here / Path(k).name): v for k, v in state["best_k_models"].items()}


def requeue() -> None:
    """Ask Slurm to run this job again, if it is one."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not job:
        return
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{' '.join(command)}: failed ({first_line(error)})", flush=True)


def _ends_by_itself(trainer: L.Trainer) -> bool:
    """Whether the run stops after the present batch, as `should_stop` alone does not say before trainer.min_epochs."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _validation_is_due(trainer: L.Trainer) -> bool:
    """Whether validation follows the present batch anyhow: not because the run is about to stop."""
    stopping, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # pyright: ignore
    finally:
        trainer.should_stop = stopping
