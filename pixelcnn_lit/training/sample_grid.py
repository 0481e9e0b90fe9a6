"""Sample grids while a model is trained."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from pixelcnn_lit.config.build import inspect_config
from pixelcnn_lit.data.datamodule import ImageData
from pixelcnn_lit.data.grids import as_rgb, grid, heat, save, tiled
from pixelcnn_lit.data.images import first_of_each_class
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.machine import chosen_threads
from pixelcnn_lit.runs.signals import Stopped, stop_if_noted
from pixelcnn_lit.training.loggers import log_picture

PAIRS = 2  # images of each class beside maps of their bits


def density_of(module: L.LightningModule) -> Density:
    """Return the density that Lightning's module trains."""
    assert isinstance(module, DensityModule)
    return module.density


class SampleGrid(Callback):
    """Draw class-conditional samples after validation, a row a class, as PNG and for the loggers.

    Beside them real images, and of some validation images where their bits are spent.

    The noise is the sampler's own, so the random stream of training is not touched; the weights are those that were
    validated (averaged ones, where this callback stands before EMA), and those of training where nothing is validated.
    `train` calls `draw` once more at the end, with the best weights.

    Args:
        sampler: config of the sampler, with n_per_class.
        every_n_epochs: 0 draws at the end alone.
    """

    def __init__(self, sampler: dict[str, Any], every_n_epochs: Annotated[int, Ge(0)] = 10) -> None:
        inspect_config("sampler", sampler, Tensor, ["request"])  # now, not after hours of training
        self.sampler, self.every_n_epochs = dict(sampler), every_n_epochs
        self.threads = chosen_threads(None)  # as `sample` does, and not as many as training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        density = density_of(pl_module)
        density.check_sampler(self.sampler)
        if not trainer.is_global_zero:
            return
        data: ImageData = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        real = first_of_each_class(data.train, density.num_classes, self.sampler.get("n_per_class", 1))
        self._show(trainer, "real", grid(real, density.levels, density.class_names))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            self._draw_if_due(trainer, pl_module)

    def _draw_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        due = due and not isinstance(trainer.strategy, FSDPStrategy)  # whose weights lie in pieces until the end
        if due and trainer.is_global_zero and not trainer.sanity_checking:
            with suppress(Stopped):  # LastCheckpoint ends the run, where all processes agree to
                self.draw(trainer, density_of(pl_module))

    def draw(self, trainer: L.Trainer, density: Density) -> Path:
        """Draw with `density` on the training device; returns the PNG's path. Raises Stopped once a signal is noted."""
        density.to(trainer.strategy.root_device)
        own = {"watch": lambda images: stop_if_noted(), "progress": trainer.progress_bar_callback is not None}
        images = density.draw(self.sampler, threads=self.threads, **own)
        self._show_bits(trainer, density)
        return self._show(trainer, "samples", grid(images, density.levels, density.called(density.classes)))

    def _show_bits(self, trainer: L.Trainer, density: Density) -> None:
        """Show some validation images, and where their bits are spent beside each."""
        data: ImageData = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        split = data.validation if len(data.validation) else data.train
        images = first_of_each_class(split, density.num_classes, PAIRS)  # [K,n,C,H,W]
        x = images.flatten(0, 1)
        y = torch.arange(len(images)).repeat_interleave(PAIRS)
        batches = zip(x.split(data.batch_size), y.split(data.batch_size), strict=True)
        bits = torch.cat([density.bits_per_pixel(*batch).cpu() for batch in batches]).view(
            *images.shape[:2], *x.shape[-2:]
        )
        there = torch.arange(PAIRS) < torch.bincount(split.y, minlength=density.num_classes)[:, None]  # [K,n]
        maps = heat(bits * there[:, :, None, None], density.uniform_bits)
        pairs = torch.stack([as_rgb(images, density.levels), maps], dim=2).flatten(1, 2)
        self._show(trainer, "bits_per_pixel", tiled(pairs, density.class_names))

    @staticmethod
    def _show(trainer: L.Trainer, name: str, picture: Tensor) -> Path:
        path = Path(trainer.default_root_dir) / f"{name}.png"
        save(picture, path)
        log_picture(trainer, name, picture)
        return path
