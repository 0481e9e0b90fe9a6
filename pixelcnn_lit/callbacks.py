"""What happens beside training: sample grids, a stopwatch, a line an epoch, the hyperparameters in TensorBoard."""

import time
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from pixelcnn_lit.build import Range, check, inspect_config
from pixelcnn_lit.command import shown
from pixelcnn_lit.data.images import first_of_each_class
from pixelcnn_lit.data.module import ImageData
from pixelcnn_lit.lit import DensityModel, bits
from pixelcnn_lit.pictures import grid, save


class SampleGrid(Callback):
    """Draw class-conditional samples after validation, a row a class, as PNG and to TensorBoard, real images beside.

    The noise is the sampler's own, so the random stream of training is not touched; the weights are those that were
    validated (averaged ones, where this callback stands before EMAWeightAveraging). `train` calls `draw` once more at
    the end, with the best weights.

    Args:
        sampler: config of the sampler, with n_per_class.
        every_n_epochs: 0 draws at the end alone.
    """

    def __init__(self, sampler: dict[str, Any], every_n_epochs: Annotated[int, Range(0)] = 10) -> None:
        inspect_config("sampler", sampler, Tensor, DensityModel.DRAW_FACTS)  # now, not after hours of training
        check("callbacks.samples", SampleGrid, {"every_n_epochs": every_n_epochs}, known=("sampler",))
        self.sampler, self.every_n_epochs = dict(sampler), every_n_epochs

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        n = self.sampler["n_per_class"]
        data: ImageData = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        real = first_of_each_class(data.train, pl_module.num_classes, n)
        self._show(trainer, "real", grid(real, pl_module.levels, n))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.is_global_zero and not trainer.sanity_checking:
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, model: DensityModel) -> Path:
        """Draw with `model` on the training device; returns the PNG's path."""
        images = model.to(trainer.strategy.root_device).draw(self.sampler)
        return self._show(trainer, "samples", grid(images, model.levels, self.sampler["n_per_class"]))

    @staticmethod
    def _show(trainer: L.Trainer, name: str, picture: Tensor) -> Path:
        path = Path(trainer.default_root_dir) / f"{name}.png"
        save(picture, path)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image(name, picture, trainer.global_step)
        return path


class LastCheckpoint(ModelCheckpoint):
    """Saves last.ckpt after each epoch, and when training is interrupted; not inside validation.

    There EMAWeightAveraging has the averaged weights in the place of the raw ones, and nothing would change them back.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.training:
            super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt):
            directory = shown(trainer.default_root_dir)
            print(f"stopped at step {trainer.global_step}; type the same with run_dir={directory} ckpt=last to go on")


class Stopwatch(Callback):
    """Seconds and images of training proper: validation and sample grids are not counted."""

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    on_train_epoch_start = on_train_start  # which a run that goes on inside an epoch does not pass

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds, self._start = self.seconds + now - self._start, now
        self.images += len(batch[0]) * trainer.world_size

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)


class ScoreAtTheEnd(Callback):
    """Validate when `max_steps` ends training inside an epoch, which Lightning does not: no score, no checkpoint."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class EpochLine(Callback):
    """One printed line an epoch, for logs and pipes, where no progress bar is."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            train, val = figures["train/nll"], figures.get("val/bpd", float("nan"))
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}"
            print(f"{where}: train {bits(train):.4f}, val {val:.4f} bpd", flush=True)


class HParams(Callback):
    """TensorBoard's HPARAMS page: settings as flat keys, beside the best val/bpd so far."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_hyperparams(_flat(self.settings), {"best/val_bpd": float("nan")})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best = trainer.checkpoint_callback
        if trainer.logger and isinstance(best, ModelCheckpoint) and best.best_model_score is not None:
            trainer.logger.log_metrics({"best/val_bpd": float(bits(best.best_model_score))}, trainer.global_step)

    on_fit_end = on_train_epoch_end  # the last score is in by now


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is neither number, flag nor text becomes text."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, bool, str)) else str(value)
    return flat
