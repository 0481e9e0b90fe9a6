"""What happens beside training: sample grids, a stopwatch, a line an epoch, the hyperparameters in TensorBoard."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from pixelcnn_lit.build import inspect_config
from pixelcnn_lit.lit import DensityModel
from pixelcnn_lit.pictures import grid, save


class SampleGrid(Callback):
    """Draw class-conditional samples after validation, a row a class, as PNG and to TensorBoard, real images beside.

    The noise is the sampler's own, so the random stream of training is not touched; the weights are those that were
    validated (averaged ones, where this callback stands before EMAWeightAveraging).

    Args:
        sampler: config of the sampler, with n_per_class.
        every_n_epochs: also draws after the last epoch; 0 for that one alone.
    """

    def __init__(self, sampler: dict[str, Any], every_n_epochs: int = 10) -> None:
        inspect_config("sampler", sampler, Tensor, DensityModel.DRAW_FACTS)  # now, not after hours of training
        self.sampler, self.every_n_epochs = dict(sampler), every_n_epochs
        self.path: Path | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: DensityModel) -> None:
        """Show real images: the first of each class in the training set."""
        split, n = trainer.datamodule.train, self.sampler["n_per_class"]
        positions = [p for c in range(pl_module.num_classes) for p in (split.y == c).nonzero()[:n, 0].tolist()]
        self._show(trainer, "real", grid(split.x[positions], pl_module.levels, n))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: DensityModel) -> None:
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.should_stop
        if trainer.sanity_checking or not (last or (self.every_n_epochs and epoch % self.every_n_epochs == 0)):
            return
        if trainer.is_global_zero:
            images = pl_module.draw(self.sampler)
            self.path = self._show(trainer, "samples", grid(images, pl_module.levels, self.sampler["n_per_class"]))

    @staticmethod
    def _show(trainer: L.Trainer, name: str, picture: Any) -> Path | None:
        if not trainer.is_global_zero:
            return None
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image(name, picture, trainer.global_step)
        path = Path(trainer.default_root_dir) / f"{name}.png"
        save(picture, path)
        return path


class Stopwatch(Callback):
    """Seconds and images of training proper: validation and sample grids are not counted."""

    def __init__(self) -> None:
        self.seconds, self.images = 0.0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._start = time.perf_counter()

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
    """One printed line an epoch, for terminals and logs without a progress bar."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if trainer.is_global_zero and not trainer.sanity_checking and "train/nll" in metrics:
            figures = f"train {metrics['train/nll']:.4f} nats/dim, val {metrics['val/bpd']:.4f} bpd"
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}: {figures}",
                flush=True,
            )


class HParams(Callback):
    """TensorBoard's HPARAMS page: every setting as one flat key, beside the best val/bpd so far."""

    def __init__(self) -> None:
        self.best = float("inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: DensityModel) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_hyperparams(_flat(pl_module.hparams), {"best/val_bpd": float("nan")})

    def on_validation_end(self, trainer: L.Trainer, pl_module: DensityModel) -> None:
        self.best = min(self.best, float(trainer.callback_metrics.get("val/bpd", self.best)))
        if trainer.logger and not trainer.sanity_checking:
            trainer.logger.log_metrics({"best/val_bpd": self.best}, trainer.global_step)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is neither number, flag nor text becomes text."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, bool, str)) else str(value)
    return flat
