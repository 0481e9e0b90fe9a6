"""Callbacks beside training: throughput, guards, a line an epoch, settings and figures for the loggers."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.lit.trainable import Trainable
from pixelcnn_lit.runs.lightning_internals import validates_by_the_clock
from pixelcnn_lit.runs.run_dir import relative, seconds_so_far
from pixelcnn_lit.runs.saved import flat, last_checkpoint
from pixelcnn_lit.training.loggers import log_settings
from pixelcnn_lit.training.trainer import counted_epoch


def trained(module: L.LightningModule) -> Trainable:
    """Return the module that Lightning hands to a hook, as what it is."""
    assert isinstance(module, Trainable)
    return module


def loss_of(outputs: STEP_OUTPUT) -> Tensor:
    """Return the loss of a training step, as Lightning has it: divided by the number of accumulated batches."""
    assert isinstance(outputs, Mapping)
    return outputs["loss"].detach()


class Throughput(Callback):
    """Seconds and images of training proper, without validation and sample grids, and all seconds of the command.

    A resumed run adds to those of before.
    """

    def __init__(self) -> None:
        self.seconds, self.images, self._before = 0.0, 0, 0.0

    @property
    def all_seconds(self) -> float:
        return self._before + seconds_so_far()

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "images": self.images, "all": self.all_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.images, self._before = (state_dict[key] for key in ("seconds", "images", "all"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    on_train_epoch_start = on_train_start  # which a run that is resumed inside an epoch does not pass

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self.seconds, self._start = self.seconds + now - self._start, now
        x, _ = batch
        self.images += len(x) * trainer.world_size

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()


class ValidateAtMaxSteps(Callback):
    """Validate when training ends between two validations, which Lightning does not: no score, no checkpoint.

    That is when `max_steps` ends it, and at the end of the last epoch where validations follow steps or the clock.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        by_epochs = trainer.check_val_every_n_epoch is not None and not validates_by_the_clock(trainer)
        last = batch_idx + 1 == trainer.num_training_batches and trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step == trainer.max_steps or (last and not by_epochs):
            trainer.should_stop = True


class StopOnNaN(Callback):
    """Stops a run whose loss or weights are no numbers any more, before any such weights are kept."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._broken_at = torch.tensor(-1, device=pl_module.device)  # step; on the device, which need not wait

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        broken = ~torch.isfinite(loss_of(outputs)) & (self._broken_at < 0)
        self._broken_at = torch.where(broken, trainer.global_step, self._broken_at)
        if pl_module.device.type == "cpu" or trainer.global_step % 10 == 0:
            self._refuse(trainer, "the loss", int(self._broken_at))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = f"val/{trained(pl_module).LOSS}"
        if not math.isfinite(trainer.callback_metrics.get(loss, 0.0)):
            self._refuse(trainer, loss, trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse(trainer, "the loss", int(self._broken_at))
        if not all(weight.isfinite().all() for weight in pl_module.parameters()):
            self._refuse(trainer, "a weight", trainer.global_step)

    @staticmethod
    def _refuse(trainer: L.Trainer, what: str, step: int) -> None:
        if step < 0:
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        good = last_checkpoint(Path(trainer.default_root_dir))
        kept = f"the last good checkpoint is {relative(good)}" if good.is_file() else "no checkpoint was written before"
        raise UserError(
            f"{what} is not finite at epoch {trainer.current_epoch + 1}, step {step}, learning rate {rate:g}; {kept}; "
            "type a smaller optimizer.lr in a new run, or trainer.precision=32-true"
        )


class TrainingLoss(Callback):
    """The mean loss of an epoch, to which the part before an interruption counts, too."""

    def __init__(self) -> None:
        self._sum_and_batches = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"sum_and_batches": self._sum_and_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sum_and_batches = state_dict["sum_and_batches"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sum_and_batches = torch.zeros(2)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        loss = loss_of(outputs) * trainer.accumulate_grad_batches  # by which Lightning has divided it
        self._sum_and_batches = self._sum_and_batches.to(loss.device) + torch.stack([loss, torch.ones_like(loss)])

    def mean(self) -> float:
        """Return the mean of the epoch so far."""
        total, batches = self._sum_and_batches.tolist()
        return total / batches if batches else math.nan

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = trained(pl_module).training_figures(torch.tensor(self.mean(), device=pl_module.device))
        pl_module.log_dict({f"train/{name}": value for name, value in figures.items()}, sync_dist=True)


class KeepFigures(Callback):
    """Keep the figures of the last validation in checkpoints, "scored", and the course of all; log the best of them.

    history: of each validation, after how many steps and images of training, and its score.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            module = trained(pl_module)
            score = f"val/{module.FIGURE}"
            passed = {"step": trainer.global_step, "images": self.throughput.images}
            self.history = [*self.history, passed | {score: module.figures[score]}]
            scores = [point[score] for point in self.history]
            best = min(scores) if module.MONITOR[1] == "min" else max(scores)
            for logger in trainer.loggers:
                logger.log_metrics({f"best/val_{module.FIGURE}": best}, trainer.global_step - 1)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["scored"] = trained(pl_module).figures

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        trained(pl_module).figures = dict(checkpoint["scored"])


class EpochLine(Callback):
    """One line an epoch, which stays above the progress bar where there is one."""

    def __init__(self, loss: TrainingLoss) -> None:
        self.loss = loss

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = trainer.callback_metrics  # in every process: where it is a mean over them, all wait for all
        if trainer.is_global_zero:
            where = f"epoch {counted_epoch(trainer)}, step {trainer.global_step}"
            line = f"{where}: {trained(pl_module).epoch_line(self.loss.mean(), figures)}"
            if bar := trainer.progress_bar_callback:
                bar.print(line)
            else:
                print(line, flush=True)


class ShowSettings(Callback):
    """Show the settings of a run wherever it is logged.

    Args:
        settings: all of them. overrides: as typed, for the choices of groups among them.
    """

    def __init__(self, settings: dict[str, Any], overrides: list[str]) -> None:
        chosen = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
        every = chosen | {key: value for key, value in flat(settings).items() if value != {}}
        self.settings = {
            key: value if isinstance(value, int | float | bool | str) else str(value) for key, value in every.items()
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_settings(trainer, self.settings)
