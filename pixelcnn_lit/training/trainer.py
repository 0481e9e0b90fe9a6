"""The Lightning Trainer of a config, and what it takes of the CPU."""

import logging
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from pixelcnn_lit.config.build import check
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.lightning_internals import (
    broadcast_no_buffers,
    clocks,
    forks_or_spawns,
    take_signals_away,
)
from pixelcnn_lit.runs.machine import fast_bf16, say_threads, take_threads


class EndWaitingProcesses(Callback):
    """End the processes that Lightning started when this one fails: they would wait for it in vain.

    Not at a stop while it trains: on that all processes agree.
    """

    def __init__(self) -> None:
        self.training = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        launcher = trainer.strategy.launcher
        agreed = self.training and isinstance(exception, SystemExit)
        if launcher is not None and not agreed:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def make_trainer(config: dict[str, Any], callbacks: Sequence[Callback] = (), **extra: object) -> L.Trainer:
    """A Trainer from conf/trainer. `precision: auto` becomes bf16 where the machine is fast at it."""
    settings = dict(config)
    if settings.get("precision") == "auto":
        settings["precision"] = "bf16-mixed" if fast_bf16(settings.get("accelerator", "auto")) else "32-true"
    if settings.get("enable_progress_bar") is None:
        settings["enable_progress_bar"] = sys.stdout.isatty()
    if settings["enable_progress_bar"] and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks = [*callbacks, OneLine()]
    own = {**extra, "use_distributed_sampler": False, "enable_model_summary": False, "barebones": False}
    own["callbacks"] = [*callbacks, EndWaitingProcesses()]
    for key in own.keys() & settings.keys():
        raise UserError(f"trainer.{key}: is set by the program; leave it out")
    _check_time(settings.get("max_time"))
    check("trainer", L.Trainer, settings)
    for key in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        value = settings.get(key)
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"trainer.{key}={value}: must be above 0")
    logging.getLogger("lightning").propagate = False  # Hydra's handler would print once more what its own prints
    # Lightning's own tips and notes bury the result.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler reports there
    # Our loaders stride over the ranks themselves; gathering whole batches needs few workers.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.15
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # renamed in torch 2.15, not yet in 2.11
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # as it is when a run is resumed
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # see resume.LastCheckpoint
    try:
        trainer = L.Trainer(**settings, **own)
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())} (trainer=auto fits any machine)") from error
    if forks_or_spawns(trainer):
        strategy = settings.get("strategy", "auto")
        raise UserError(f"trainer.strategy={strategy}: would fork or spawn this process; type ddp, which starts others")
    if trainer.world_size > 1 and isinstance(settings.get("val_check_interval"), str):
        raise UserError("trainer.val_check_interval: each process has its own clock; type a number of batches, or 1.0")
    take_signals_away(trainer)
    broadcast_no_buffers(trainer)
    return trainer


def _check_time(limit: object) -> None:
    if limit is not None and not isinstance(limit, dict) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(limit)):
        raise UserError(
            f"trainer.max_time={limit}: must be days:hours:minutes:seconds, two digits each; "
            "type trainer.max_time=00:00:10:00 for ten minutes"
        )


def settle_threads(trainer: L.Trainer, typed: int | None, work: float) -> int | None:
    """Take the threads of each of the trainer's processes on a CPU, and say so once; return their number.

    `work` is that of a step of all processes together, as `step_work` has it. On other devices the number is `typed`.
    """
    device = trainer.strategy.root_device
    if device.type != "cpu":
        return typed
    threads = take_threads(typed, work / trainer.world_size, trainer.num_devices)
    trainer.callbacks.append(KeepThreads(threads))  # pyright: ignore[reportAttributeAccessIssue]
    if trainer.is_global_zero:
        say_threads(device, threads)
    return threads


class KeepThreads(Callback):
    """Give torch its threads back in each of several processes, in which Lightning's launcher sets another number."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        take_threads(self.threads)


def require_batches(trainer: L.Trainer, name: str, n_images: int, batch_size: int) -> None:
    """Raise UserError where a limit of the trainer, for "val" or "test", leaves none of so many images to score."""
    limit, batches = getattr(trainer, f"limit_{name}_batches"), -(-n_images // batch_size)
    if not int(limit * batches if isinstance(limit, float) else limit):
        overfits = name == "val" and trainer.overfit_batches  # pyright: ignore[reportAttributeAccessIssue]
        flag = "overfit_batches" if overfits else f"limit_{name}_batches"
        raise UserError(f"trainer.{flag}={limit:g}: leaves none of {batches} batches to score; type 1.0 or a number")


def counted_epoch(trainer: L.Trainer) -> str:
    """Return which epoch it is, of how many: "3/7", or "3" where the clock or the steps end the run."""
    last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"{trainer.current_epoch + 1}{last}"


def _cleared(bar: Tqdm) -> Tqdm:
    """Let a bar leave nothing behind, and leave room for the ^C that a terminal shows, which would break its line."""
    bar.clear()  # it was drawn as it was made
    bar.leave = False
    if bar.dynamic_ncols:
        bar.dynamic_ncols = lambda _: (shutil.get_terminal_size().columns - 3, None)
    return bar


class OneLine(TQDMProgressBar):
    """Lightning's bars on one line of 80 columns, which is empty when training ends, however it does.

    Validation takes the line of training for its time. Where trainer.max_time ends the run, the time to go is that of
    the clock, not of the epoch.
    """

    def init_train_tqdm(self) -> Tqdm:
        bar = _cleared(super().init_train_tqdm())
        if clocks(self.trainer):
            bar.bar_format = self.BAR_FORMAT.replace("<{remaining}", "")
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        bar = _cleared(super().init_validation_tqdm())
        bar.pos = 0
        return bar

    def init_test_tqdm(self) -> Tqdm:
        return _cleared(super().init_test_tqdm())

    def on_train_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(f"epoch {counted_epoch(trainer)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar, self._test_progress_bar):
            if bar is not None and not bar.disable:
                bar.close()
                print("\r\x1b[K", end="", flush=True)  # and the ^C beside it

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict]:
        shown: dict[str, int | str | float | dict] = {}
        left = [max(0, round(seconds)) for _, seconds in clocks(trainer)]  # the last step ends after its time
        if left:
            shown["left"] = str(timedelta(seconds=min(left)))
        for key, value in trainer.callback_metrics.items():
            if key.endswith("_step"):
                shown[key.split("/")[1].removesuffix("_step")] = f"{float(value):.3f}"
                break  # there is room for one
        return shown
