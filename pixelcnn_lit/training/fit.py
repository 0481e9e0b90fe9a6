"""A run in its directory: it starts or goes on where it was cut off, and keeps what is best and what is last."""

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from pixelcnn_lit.checkpoints.load import require_loadable
from pixelcnn_lit.checkpoints.read import read_checkpoint, require_same
from pixelcnn_lit.config.build import build, check
from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.config.quoting import setting
from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.lit.trainable import Trainable
from pixelcnn_lit.runs.atomic import write_text
from pixelcnn_lit.runs.machine import step_work
from pixelcnn_lit.runs.run_dir import run_dir, shown
from pixelcnn_lit.runs.saved import CONFIG, alone_in, last_checkpoint, saved_settings, starting_point, typed_settings
from pixelcnn_lit.runs.signals import Stopped
from pixelcnn_lit.training.callbacks import EpochLine, FiniteGuard, HParams, ScoreAtTheEnd, Stopwatch, TrainingLoss
from pixelcnn_lit.training.checkpoint_io import AtomicCheckpointIO
from pixelcnn_lit.training.resume import Streams
from pixelcnn_lit.training.trainer import make_trainer, require_batches, settle_threads


def start_or_go_on(
    train: Callable[..., None], ckpt: str | None, skip_completed: bool, settings: dict[str, Any]
) -> None:
    """Call train(directory, start, **settings): `start` is None, or the checkpoint from which a run goes on.

    A run that goes on does so with its own settings. See `runs` for `ckpt`.
    """
    directory, typed = run_dir(), typed_settings()
    if skip_completed and completed(directory, typed):
        print(f"{shown(directory)}: completed before, left alone")
        return
    with alone_in(directory) if rank_zero_only.rank == 0 else nullcontext():  # pyright: ignore
        start = starting_point(directory, ckpt, or_anew=skip_completed)
        settings = saved_settings(directory, typed) if start else {"scheduler": None, **settings, "overrides": typed}
        check("", train, settings, known=("directory", "start"))
        try:
            train(directory, start, **settings)
        except Stopped:
            say_how_to_go_on(directory)
            raise


def completed(directory: Path, typed: list[str]) -> bool:
    """Whether the very run that is typed has left its result."""
    if not (directory / "result.json").is_file():
        return False
    before = json.loads((directory / "result.json").read_bytes())["overrides"]
    if set(before) != set(typed):
        raise UserError(
            f"run_dir={shown(directory)}: completed with {shlex.join(before)}; type that, or another run_dir"
        )
    return True


@rank_zero_only
def say_how_to_go_on(directory: Path) -> None:
    if last_checkpoint(directory).is_file():
        module, run = f"pixelcnn_lit.{HydraConfig.get().job.config_name}", setting("run_dir", shown(directory))
        print("stopped; to go on, type:", shlex.join(["python", "-m", module, run, "ckpt=last"]))
    else:
        print("stopped; nothing was saved yet")


class Fitted(NamedTuple):
    """What is left when training has ended.

    scored: the validation figures of the best checkpoint. extras: the callbacks of the config.
    """

    trainer: L.Trainer
    best_checkpoint: str
    scored: dict[str, float]
    stopwatch: Stopwatch
    extras: list[Callback]

    def result(self, best: Trainable, label: str) -> dict[str, Any]:
        """What result.json holds of any run: figures are of the weights best on validation."""
        return {
            "label": label,
            **self.scored,
            **best.figures,
            "epochs": self.trainer.current_epoch,
            "steps": self.trainer.global_step,
            "images_per_second": self.stopwatch.images_per_second,
            "precision": self.trainer.precision,
            "checkpoint": self.best_checkpoint,
        }


def fit(
    directory: Path,
    start: Path | None,
    module: Trainable,
    data: ImageData,
    settings: dict[str, Any],
    beside: dict[str, Any],
) -> Fitted:
    """Train `module` in `directory`, from the checkpoint `start` on if there is one.

    Args:
        settings: those that a sweep varies. beside: those that are saved with them; in the place of their `threads`
            the number that was taken, so that a run that goes on takes it again.
    """
    require_loadable(*module.stored())
    torch.compiler.reset()  # the jobs of a sweep share a process: from the ninth on, none would be compiled
    stopwatch, loss, saved_with = Stopwatch(), TrainingLoss(), settings | beside
    extras = [build_callback(name, own) for name, own in saved_with["callbacks"].items()]
    saved = read_start(str(start), module, data, extras) if start else {}
    begun = Begun(directory, saved_with)
    always = [Streams(settings["seed"]), FiniteGuard(), stopwatch, loss, HParams(settings), ScoreAtTheEnd(), begun]
    trainer = make_trainer(
        settings["trainer"],
        callbacks=[*extras, *always, *([] if sys.stdout.isatty() else [EpochLine(loss)])],
        # purge_step: TensorBoard forgets what the run wrote after its last checkpoint
        logger=TensorBoardLogger(
            directory, name="", version="", default_hp_metric=False, purge_step=saved.get("global_step")
        ),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=directory,
    )
    require_scores(trainer, data, *module.MONITOR)
    work = step_work(module, data.facts["image_shape"], data.batch_size)
    saved_with["threads"] = settle_threads(trainer, saved_with["threads"], work)
    if trainer.precision == "64-true":
        module.double()  # Lightning does so when it has loaded a checkpoint, which would be rounded
    try:
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if start and not begun.training:  # what Lightning restores from it is not what it should be
            raise UserError(f"ckpt={start}: cannot be gone on from ({first_line(error)})") from error
        raise
    kept = trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or not Path(kept.best_model_path).is_file():
        raise UserError(
            "nothing was trained and validated in this run: type a larger trainer.max_epochs, max_steps, max_time or "
            "limit_train_batches"
        )
    best = kept.best_model_path
    return Fitted(trainer, best, read_checkpoint(best)["scored"], stopwatch, extras)


def build_callback(name: str, config: dict[str, Any]) -> Callback:
    """A callback of the config. Raises UserError for those of Lightning's own that fit no module here."""
    built = build(f"callbacks.{name}", config, Callback)
    unfit = {
        BatchSizeFinder: "trains before the run begins; type a sweep: -m dataset.batch_size=64,128",
        LearningRateFinder: "trains before the run begins; type a sweep: -m optimizer.lr=2e-3,5e-3",
        BackboneFinetuning: "wants a module with a backbone",
        ModelPruning: "puts other weights in the place of a network's, which no checkpoint could be loaded with",
    }
    if type(built) in unfit:
        raise UserError(f"callbacks.{name}: {type(built).__name__} {unfit[type(built)]}")
    return built


def write_result(directory: Path, result: dict[str, Any], stopwatch: Stopwatch) -> dict[str, Any]:
    """Leave result.json, with the seconds so far; returns what is in it."""
    result = {**result, "seconds": stopwatch.all_seconds}
    write_text(directory / "result.json", json.dumps(result, indent=2))
    return result


class Begun(Callback):
    """Saves the settings, now that all of them have been accepted, and knows that training has begun.

    A result of before is none of the run that goes on.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings, self.training = directory, settings, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = True
        if trainer.is_global_zero:
            write_text(self.directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(self.settings)))
            (self.directory / "result.json").unlink(missing_ok=True)


def require_scores(trainer: L.Trainer, data: ImageData, monitor: str, mode: str) -> None:
    """Refuse, before any training, settings under which nothing would be kept as best, or tested."""
    every, epochs, kept = trainer.check_val_every_n_epoch, trainer.max_epochs, trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or (kept.monitor, kept.mode) != (monitor, mode):
        raise UserError(f"callbacks.best: must keep the weights best on {monitor} (mode {mode}); type that")
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError("trainer.fast_dev_run: keeps no checkpoint; type trainer.max_steps=1")
    for name, split in (("val", data.validation), ("test", data.test)):
        require_batches(trainer, name, len(split), data.batch_size)
    if every and epochs is not None and 0 <= epochs < every:
        raise UserError(f"trainer.max_epochs={epochs}: type at least trainer.check_val_every_n_epoch={every}")


def read_start(path: str, module: Trainable, data: ImageData, extras: list[Callback]) -> dict[str, Any]:
    """The checkpoint to go on from, which must be of the same data and model, with as many averages."""
    saved = read_checkpoint(path)
    if not all(saved.get(key) for key in ("loops", "callbacks", "optimizer_states")):
        raise UserError(f"ckpt={path}: weights alone, from which no run can go on; type RUN_DIR/checkpoints/last.ckpt")
    same = (*ImageData.FACTS, *module.IDENTITY)
    require_same(path, saved["hyper_parameters"], {key: module.hparams[key] for key in same})
    if difference := data.changed_since(saved, *data.state_dict()):
        raise UserError(f"ckpt={path}: {difference}; put those images back, or start another run")
    averaged = any(isinstance(callback, WeightAveraging) for callback in extras)
    if ("averaging_state" in saved) != averaged:
        # Lightning alone would silently go on from the averaged weights, or with none.
        raise UserError(f"ckpt={path}: saved with callbacks={'no_ema' if averaged else 'default'}; type that")
    return saved
