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
from pixelcnn_lit.runs.atomic import remove_partial_files
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
    """

    def __init__(
        self, every_n_minutes: Annotated[float, Ge(0)] = 10.0, every_n_steps: Annotated[int, Ge(1)] | None = None
    ) -> None:
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path = last_checkpoint(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._owed = False  # whether the epoch that ends is still to be saved
        self._safe = True  # whether all is saved: a resumed run may begin with a validation
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
        self._batches(trainer).skip(0)
        Loops(trainer).begin_epoch()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        self._safe = False
        loops = Loops(trainer)
        if loops.accumulates or loops.ends_by_itself:
            return  # gradients are in no checkpoint; a run that stops by itself is saved with its last score
        validation = loops.validation_is_due
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

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how many batches every process has, the last of which can be missing in some."""
        batches = [sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)]
        fewest = -torch.tensor(batches, device=trainer.strategy.root_device)
        self._common_batches = -int(trainer.strategy.reduce(fewest, reduce_op="max"))  # pyright: ignore

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._safe and batch_idx < self._common_batches:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._safe:
            self._stop_if_asked(trainer)  # a sample grid may have been left unfinished

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loops = Loops(trainer)
        validation = loops.validation_is_due
        if loops.ends_by_itself and validation:
            self._save(trainer)  # as before that validation, whose scheduler step follows it
        loops.step_plateau_schedulers()
        if (self._owed or loops.ends_by_itself) and not validation:
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)  # the test is still to come

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        Loops(trainer).write_progress(checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
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
