"""Fitting a module in a run: what is best and what is last is kept, and its result."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    WeightAveraging,
)
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pixelcnn_lit.checkpoints.load import require_loadable
from pixelcnn_lit.checkpoints.read import read_checkpoint, require_same
from pixelcnn_lit.config.build import build, resolve
from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.data.images import fingerprint
from pixelcnn_lit.lit.trainable import Trainable
from pixelcnn_lit.runs.atomic import atomic_write, atomic_write_text
from pixelcnn_lit.runs.machine import made_with, step_work
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.saved import CONFIG, last_checkpoint
from pixelcnn_lit.training.callbacks import (
    EpochLine,
    KeepFigures,
    ShowSettings,
    StopOnNaN,
    Throughput,
    TrainingLoss,
    ValidateAtMaxSteps,
)
from pixelcnn_lit.training.checkpoint_io import AtomicCheckpointIO
from pixelcnn_lit.training.loggers import open_loggers, with_run_ids
from pixelcnn_lit.training.resume import SeedEveryStep
from pixelcnn_lit.training.run import Run
from pixelcnn_lit.training.trainer import make_trainer, require_batches, settle_threads


class Fitted(NamedTuple):
    """The outcome of training.

    scored: the validation figures of the best checkpoint, if there are any. history: see `KeepFigures`.
    extras: the callbacks of the config.
    """

    trainer: L.Trainer
    best_checkpoint: str
    scored: dict[str, float]
    history: list[dict[str, float]]
    throughput: Throughput
    extras: list[Callback]

    def result(self, best: Trainable, data: ImageData) -> dict[str, Any]:
        """Return what result.json holds of any run: figures are of the best checkpoint."""
        splits = {"val": data.validation, "test": data.test}
        return {
            "label": data.label,
            **self.scored,
            **best.figures,
            **{f"{short}/fingerprint": fingerprint(split) for short, split in splits.items() if len(split)},
            "epochs": self.trainer.current_epoch,
            "steps": self.trainer.global_step,
            "images_per_second": self.throughput.images_per_second,
            "precision": self.trainer.precision,
            "checkpoint": self.best_checkpoint,
            "history": self.history,
            **made_with(self.trainer.strategy.root_device),
        }


def fit(run: Run, module: Trainable, data: ImageData, hparams: dict[str, Any], extra_config: dict[str, Any]) -> Fitted:
    """Train `module` in a run, from its checkpoint on if it is resumed.

    Args:
        hparams: the settings that a sweep varies. extra_config: those that are saved with them; in the place of their
            `threads` the number that was taken, so that a resumed run takes it again.
    """
    require_loadable(*module.stored())
    torch.compiler.reset()  # the jobs of a sweep share a process: from the ninth on, none would be compiled
    saved_with = hparams | extra_config
    if not len(data.validation):
        saved_with |= without_validation(saved_with)
    saved_with["logger"] = with_run_ids(saved_with["logger"])
    extras = [build_callback(name, own) for name, own in saved_with["callbacks"].items()]
    for callback in extras:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(run.directory / "checkpoints")  # and not where the first logger would have it
    if not saved_with["logger"]:  # LearningRateMonitor refuses to do without
        extras = [callback for callback in extras if not isinstance(callback, LearningRateMonitor)]
    saved = load_resume_state(str(run.start), module, data, extras) if run.start else {}
    if run.start:
        rank_zero_only(print)(f"resumes at step {saved['global_step']} ({relative(run.start)})")
    loggers = open_loggers(saved_with["logger"], run.directory, saved.get("global_step"), run.closing)
    begun = SaveConfig(run.directory, saved_with)
    throughput = Throughput()
    kept = KeepFigures(throughput)
    loss = TrainingLoss()
    always = [
        SeedEveryStep(hparams["seed"]),
        StopOnNaN(),
        throughput,
        loss,
        ShowSettings(hparams, saved_with["overrides"]),
        ValidateAtMaxSteps(),
        kept,
        EpochLine(loss),
        begun,
    ]
    trainer = make_trainer(
        saved_with["trainer"],
        callbacks=[*extras, *always],
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.directory,
    )
    require_scores(trainer, data, *module.MONITOR)
    data.state_dict()  # checksums of all images, now and not at the first checkpoint
    work = step_work(module, data.facts["image_shape"], data.batch_size)
    saved_with["threads"] = settle_threads(trainer, saved_with["threads"], work)
    if trainer.precision == "64-true":
        module.double()  # Lightning does so when it has loaded a checkpoint, which would be rounded
    limits = f"trainer.max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
    if run.start and 0 <= (trainer.max_epochs or 0) < saved.get("epoch", 0):
        trainer.fit_loop.max_epochs = saved["epoch"]  # Lightning refuses a limit that is long past: nothing is left
    try:
        trainer.fit(module, data, ckpt_path=run.start, weights_only=True)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if run.start and not begun.training:  # what Lightning restores from it is not what it should be
            raise UserError(f"ckpt={run.start}: cannot be resumed from ({first_line(error)})") from error
        raise
    best = best_weights(trainer, run, data)
    if run.start and trainer.global_step == saved["global_step"]:
        rank_zero_only(print)(f"nothing was left to train ({limits}); the best weights are scored")
    return Fitted(trainer, best, read_checkpoint(best)["scored"], kept.history, throughput, extras)


def build_callback(name: str, config: dict[str, Any]) -> Callback:
    """A callback of the config. Raises UserError for those of Lightning's own that fit no module here."""
    built = build(f"callbacks.{name}", config, Callback)
    unfit = {
        BatchSizeFinder: "trains before the run begins; type a sweep: -m dataset.batch_size=64,128",
        LearningRateFinder: "trains before the run begins; type a sweep: -m optimizer.lr=2e-3,5e-3",
        BackboneFinetuning: "requires a module with a backbone",
        ModelPruning: "puts other weights in the place of a network's, which no checkpoint could be loaded with",
    }
    if type(built) in unfit:
        raise UserError(f"callbacks.{name}: {type(built).__name__} {unfit[type(built)]}")
    return built


def write_result(directory: Path, result: dict[str, Any], throughput: Throughput) -> dict[str, Any]:
    """Leave result.json, with the seconds so far; returns what is in it."""
    result = {**result, "seconds": throughput.all_seconds}
    atomic_write_text(directory / "result.json", json.dumps(result, indent=2))
    return result


def scores_line(result: dict[str, Any], figure: str, form: str, unit: str = "") -> str:
    """Return what a run has scored by a figure, for its closing lines."""
    test = f"test {result[f'test/{figure}']:{form}}{unit} on"
    if f"val/{figure}" not in result:
        return f"{result['label']}: the last weights, {test} {result['test/images']} images"
    val = f"val {result[f'val/{figure}']:{form}}"
    return f"{result['label']}: {val}, {test} {result['val/images']} and {result['test/images']} images"


class SaveConfig(Callback):
    """Save the settings, now that all of them have been accepted, and know that training has begun.

    The result of an earlier part of the run is removed: it is none of what follows.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings, self.training = directory, settings, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = True
        if trainer.is_global_zero:
            atomic_write_text(self.directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(self.settings)))
            # The same for programs of other kinds; read by none of this one's.
            atomic_write_text(self.directory / "config.json", json.dumps(self.settings, indent=2))
            (self.directory / "result.json").unlink(missing_ok=True)


def without_validation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what changes in the settings of a run where no images are left to validate on: no weights are best.

    Raises UserError where a setting wants the figures of a validation.
    """
    without = "dataset.validation_fraction=0 leaves nothing to validate on"
    scheduler = settings["scheduler"]
    if scheduler and resolve(scheduler.get("_target_"), LRScheduler) is ReduceLROnPlateau:
        raise UserError(f"scheduler: ReduceLROnPlateau follows validations, and {without}; type another")
    callbacks = {name: config for name, config in settings["callbacks"].items() if name != "best"}
    for name, config in callbacks.items():
        match config:
            case {"monitor": str(monitor)} if monitor.startswith("val/"):
                raise UserError(f"callbacks.{name}.monitor={monitor}: {without}; type ~callbacks.{name}")
    # What else would follow a validation follows each epoch.
    every_epoch = {"limit_val_batches": 0, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    return {"callbacks": callbacks, "trainer": settings["trainer"] | every_epoch}


def best_weights(trainer: L.Trainer, run: Run, data: ImageData) -> str:
    """Return the checkpoint to be tested: best on validation, or without one a copy of the last.

    Raises UserError where there is none.
    """
    kept = trainer.checkpoint_callback
    best = kept.best_model_path if isinstance(kept, ModelCheckpoint) else ""
    if not len(data.validation):
        last = last_checkpoint(run.directory)
        best = str(last.with_name("best.ckpt"))
        if trainer.is_global_zero and last.is_file():
            with atomic_write(Path(best)) as file:
                file.write(last.read_bytes())
        trainer.strategy.barrier()  # for all, whatever each of them sees of a slow file system
    if not Path(best).is_file():
        raise UserError(
            "nothing was trained and kept in this run: type a larger trainer.max_epochs, max_steps, max_time or "
            "limit_train_batches"
        )
    return best


def require_scores(trainer: L.Trainer, data: ImageData, monitor: str, mode: str) -> None:
    """Refuse, before any training, settings under which nothing would be kept as best, or tested."""
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError("trainer.fast_dev_run: keeps no checkpoint; type trainer.max_steps=1")
    require_batches(trainer, "test", len(data.test), data.batch_size)
    if not len(data.validation):
        return
    require_batches(trainer, "val", len(data.validation), data.batch_size)
    kept = trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or (kept.monitor, kept.mode) != (monitor, mode) or not kept.save_top_k:
        raise UserError(f"callbacks.best: must keep the weights best on {monitor} (mode {mode}); type that")
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every and epochs is not None and 0 <= epochs < every:
        raise UserError(f"trainer.max_epochs={epochs}: type at least trainer.check_val_every_n_epoch={every}")


def load_resume_state(path: str, module: Trainable, data: ImageData, extras: list[Callback]) -> dict[str, Any]:
    """Return the checkpoint to resume from, which must be of the same data and model, with as many averages."""
    saved = read_checkpoint(path)
    if not all(saved.get(key) for key in ("loops", "callbacks", "optimizer_states")):
        raise UserError(
            f"ckpt={path}: weights alone, from which no run can be resumed; type RUN_DIR/checkpoints/last.ckpt"
        )
    same = (*ImageData.FACTS, *module.IDENTITY)
    require_same(path, saved["hyper_parameters"], {key: module.hparams[key] for key in same})
    if difference := data.changed_since(saved, *data.state_dict()):
        raise UserError(f"ckpt={path}: {difference}; put those images back, or start another run")
    averaged = any(isinstance(callback, WeightAveraging) for callback in extras)
    if ("averaging_state" in saved) != averaged:
        # Lightning alone would silently resume from the averaged weights, or with none.
        raise UserError(f"ckpt={path}: saved with callbacks={'samples' if averaged else 'default'}; type that")
    return saved
