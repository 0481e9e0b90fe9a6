"""All that this program reads or changes of Lightning's private parts, tried with the versions in TESTED."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.signals import postpone_signals

TESTED = ("2.6",)

if ".".join(L.__version__.split(".")[:2]) not in TESTED:
    raise UserError(
        f"lightning {L.__version__}: resuming to the bit was tried with {', '.join(TESTED)} alone; "
        f"type pip install 'lightning=={TESTED[-1]}.*'"
    )


class Loops:
    """The loops of a Trainer that fits, after an optimizer step: what is done, and what comes next.

    A checkpoint can be written at three moments, of which Lightning's counts tell too little to resume from:

    | moment            | `batches_done`  | `validation_is_due` | what a resumed run does first              |
    |-------------------|-----------------|---------------------|--------------------------------------------|
    | mid-epoch         | < those of one  | no                  | the next batch                             |
    | before validation | <= those of one | yes                 | that validation, with the weights of then  |
    | epoch over        | those of one    | no                  | the next epoch, schedulers having stepped  |
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.fit: Any = trainer.fit_loop
        self.epoch: Any = trainer.fit_loop.epoch_loop

    @property
    def batches_done(self) -> int:
        """Batches of the present epoch that are done."""
        return self.epoch.batch_progress.current.completed

    @property
    def accumulates(self) -> bool:
        """Whether gradients wait for more batches before a step."""
        return self.fit._should_accumulate()

    @property
    def ends_by_itself(self) -> bool:
        """Whether the run stops after this batch, as `should_stop` alone does not say before trainer.min_epochs."""
        return self.trainer.should_stop and self.fit._can_stop_early

    @property
    def validation_is_due(self) -> bool:
        """Whether validation follows this batch anyhow: not because the run is about to stop."""
        stopping, self.trainer.should_stop = self.trainer.should_stop, False
        try:
            return self.epoch._should_check_val_fx(self.fit._data_fetcher)
        finally:
            self.trainer.should_stop = stopping

    def begin_epoch(self) -> None:
        """Begin an epoch as a whole one: a resumed run would otherwise skip or repeat parts of the one before."""
        self.epoch.restarting = False

    def step_plateau_schedulers(self) -> None:
        """Step ReduceLROnPlateau at the end of an epoch, now.

        Lightning does so after the last hook that could save, and not in an epoch that was resumed.
        """
        if self.epoch._num_ready_batches_reached():
            self.epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        self.fit._restarting = True  # so it does not do so again

    def write_progress(self, checkpoint: dict[str, Any]) -> None:
        """Write progress in one way, whichever hook saves: this batch is done, its validation is not."""
        validation = self.validation_is_due
        loops = checkpoint["loops"]["fit_loop"]
        done = loops["epoch_loop.batch_progress"]["current"]["processed"]
        epoch_over = done >= self.trainer.num_training_batches and not validation
        for counts in ("total", "current"):
            epochs, steps = loops["epoch_progress"][counts], loops["epoch_loop.batch_progress"][counts]
            completed = epochs["completed"] + epoch_over
            begun = completed + (not epoch_over)
            epochs.update(ready=begun, started=begun, processed=completed, completed=completed)
            steps.update(dict.fromkeys(steps, steps["processed"]))
        if epoch_over:
            current = loops["epoch_loop.batch_progress"]["current"]
            current.update(dict.fromkeys(current, 0))
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        evaluated = loops["epoch_loop.val_loop.batch_progress"]
        for counts in ("total", "current"):
            evaluated[counts] = dict.fromkeys(evaluated[counts], 0)
        if validation:  # how Lightning recognises an evaluation that was interrupted
            evaluated["total"].update(ready=1, started=1)
            evaluated["is_last_batch"] = False
        # The step that loggers write; it moves after validation.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self.trainer.global_step - validation


def validates_by_the_clock(trainer: L.Trainer) -> bool:
    """Return whether validations follow the time, trainer.val_check_interval="00:01:00:00"."""
    return trainer._val_check_time_interval is not None  # pyright: ignore[reportAttributeAccessIssue]


def clocks(trainer: L.Trainer) -> list[tuple[float, float]]:
    """Seconds over and seconds left by each clock that ends the run: that of trainer.max_time, if any."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    timers = [callback for callback in callbacks if isinstance(callback, Timer)]
    return [(timer.time_elapsed(), left) for timer in timers if (left := timer.time_remaining()) is not None]


def forks_or_spawns(trainer: L.Trainer) -> bool:
    """Return whether its strategy would copy this process, and not start others from the command line."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def take_signals_away(trainer: L.Trainer) -> None:
    """Let Lightning install no handlers of signals, and let none strike while it starts processes.

    Its handlers lock, save and broadcast where a signal strikes, and wait for ever for what they interrupted. And it
    cannot end a process that a signal kept it from writing down.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    launcher: Any = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher._call_children_scripts = postpone_signals()(launcher._call_children_scripts)


def broadcast_no_buffers(trainer: L.Trainer) -> None:
    """Validation runs through DDP's wrapper; its broadcast of buffers waits for ever for ranks without a batch left."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs["broadcast_buffers"] = False


class FloatAveraging(WeightAveraging):
    """Lightning's averaging of weights, on the training device, and never rounded to the weights' type.

    Lightning leaves the average on the CPU, where the model still is; and for validation it exchanges the two.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights."""
        if self._average_model is not None:
            kept = *pl_module.parameters(), *pl_module.buffers()
            self._weights: list[torch.Tensor] = [tensor.detach().clone() for tensor in kept]
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        if self._average_model is not None:
            for tensor, kept in zip((*pl_module.parameters(), *pl_module.buffers()), self._weights, strict=True):
                tensor.data.copy_(kept)
            del self._weights
