"""Callbacks with which an interrupted run ends as if nothing had happened, bit for bit."""

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
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from pixelcnn_lit.config.errors import first_line
from pixelcnn_lit.data.loader import Batches
from pixelcnn_lit.runs.atomic import remove_partial_files, second_name
from pixelcnn_lit.runs.lightning_internals import Loops
from pixelcnn_lit.runs.saved import last_checkpoint
from pixelcnn_lit.runs.signals import Stopped, note_signals, noted


class SeedEveryStep(Callback):
    """Makes all chance within a training step a function of (seed, epoch, batch, rank), as the order of the data is.

    So a resumed run needs no random state, whatever validation, sample grids or other processes drew meanwhile.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        key = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        (drawn,) = np.random.SeedSequence(key).generate_state(1)
        torch.manual_seed(int(drawn))  # of every device
        np.random.seed(drawn)  # noqa: NPY002 (the global stream is what other people's code draws from)
        random.seed(int(drawn))


class LastCheckpoint(Checkpoint):
    """Keep the checkpoint from which a run is resumed, bit for bit.

    It is written before each validation (so that an interrupted validation is re-run), every
    `every_n_minutes` or `every_n_steps` in between, and on SIGINT, SIGTERM and SIGUSR1, which then end the run with
    exit code 130, 143 or 138. All this happens between two optimizer steps and nowhere else.

    A signal is noted when it strikes. It is obeyed after an optimizer step, or between two batches of an evaluation
    that a resumed run would repeat; several processes agree on it first. A sample grid is left unfinished where the
    first process got the signal, which draws it. At SIGUSR1, which Slurm sends before the time is over
    (`sbatch --signal=USR1@120`), the job is requeued.

    `keep` of them are kept: last.ckpt, last-1.ckpt before it, and so on.
    """

    def __init__(
        self,
        every_n_minutes: Annotated[float, Ge(0)] = 10.0,
        every_n_steps: Annotated[int, Ge(1)] | None = None,
        keep: Annotated[int, Ge(1)] = 2,
    ) -> None:
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.keep = keep

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = last_checkpoint(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = True  # whether last.ckpt holds all that was trained
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            remove_partial_files(self.path.parent)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches(trainer).skip(Loops(trainer).batches_done)
        note_signals()

    @staticmethod
    def _batches(trainer: L.Trainer) -> Batches:
        return trainer.train_dataloader.batch_sampler  # pyright: ignore[reportOptionalMemberAccess]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches(trainer).skip(0)  # a run resumed before the validation at an epoch's end began no pass since
        Loops(trainer).begin_epoch()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        self._saved = False
        loops = Loops(trainer)
        if loops.accumulates:
            return  # gradients that wait for more are in no checkpoint
        if loops.ends_by_itself:
            return  # on_train_epoch_end saves it
        validation_follows = loops.validation_is_due
        signum, late = self._agreed(trainer)
        if batch_idx + 1 == trainer.num_training_batches and not validation_follows:
            return  # on_train_epoch_end saves it: schedulers are still to be stepped
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if validation_follows or late or signum or due:
            self._save(trainer)
        if signum:
            self._stop(trainer, signum)

    def _save(self, trainer: L.Trainer) -> None:
        directory = self.path.parent.parent
        if trainer.is_global_zero:
            keep_before(directory, self.keep)
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            last_checkpoint(directory, self.keep).unlink(missing_ok=True)
        self._saved = True
        self._saved_at = time.monotonic()

    def _agreed(self, trainer: L.Trainer) -> tuple[int, bool]:
        """Return the signal that asks to stop, or 0, and whether it is time to save: the same in every process."""
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        signum, some_are_late = over_processes(trainer, "max", noted(), int(late))
        return signum, bool(some_are_late)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        signum, _ = self._agreed(trainer)
        if signum:
            self._stop(trainer, signum)

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        """End the run, whose last checkpoint is written."""
        if not trainer.is_global_zero:
            raise SystemExit  # with 0: at any other code Lightning kills the first process, which may not be done
        if signum == getattr(signal, "SIGUSR1", None):
            requeue()
        raise Stopped(signum)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how many batches every process has, the last of which can be missing in some."""
        own = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
        (self._common_batches,) = over_processes(trainer, "min", int(own))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._saved and batch_idx < self._common_batches:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved:
            self._stop_if_asked(trainer)  # a sample grid may have been left unfinished

    # A test, too, is run again by a resumed run.
    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the last batch left to be saved: a run that ends by itself, or an epoch."""
        loops = Loops(trainer)
        validated = loops.validation_is_due  # now that it has been: a resumed run begins with it
        if validated and loops.ends_by_itself:
            self._save(trainer)  # before the plateau's step, which follows the validation
        loops.step_plateau_schedulers()
        if not validated and (not self._saved or loops.ends_by_itself):
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)  # the test is still to come

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        Loops(trainer).write_progress(checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the paths of other callbacks follow a run directory that was moved; and none lead out of it."""
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                move_paths(state, self.path.parent)


def keep_before(directory: Path, keep: int) -> None:
    """Let the last checkpoint of a run be the one before the last, and so on, before another is written.

    Until then it has both names, so one more than `keep` of them are left.
    """
    last, before_it = last_checkpoint(directory), last_checkpoint(directory, 1)
    if last.is_file() and before_it.is_file() and before_it.samefile(last):
        return  # a run was killed while it wrote
    for before in range(keep, 0, -1):
        newer = last_checkpoint(directory, before - 1)
        if newer.is_file():
            second_name(newer, last_checkpoint(directory, before))


def move_paths(state: dict[str, Any], here: Path) -> None:
    """Let the state of a ModelCheckpoint name the same files in the directory `here`."""
    state["dirpath"] = str(here)
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = state[key] and str(here / Path(state[key]).name)
    state["best_k_models"] = {str(here / Path(file).name): score for file, score in state["best_k_models"].items()}


def over_processes(trainer: L.Trainer, how: str, *numbers: int) -> list[int]:
    """Return the largest ("max") or smallest ("min") of each number over all processes."""
    if trainer.world_size == 1:
        return list(numbers)
    own = torch.tensor(numbers, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(own, reduce_op=how).tolist()  # pyright: ignore[reportAttributeAccessIssue]


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
