"""The checkpoints that are best on validation."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.atomic import second_name


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also keeps several: the best as `filename`, and all with their step behind it.

    With save_top_k=3 these are best.ckpt, a second name of the first of best-120.ckpt, best-80.ckpt and best-160.ckpt.
    Lightning alone would write all of them to one file, the worse over the better.
    """

    best_name: str | None = None  # of the best of several
    _named = ""  # which of them has it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.save_top_k == 1 or self.best_name:
            return
        if not self.filename or "{" in self.filename:
            raise UserError(f"callbacks.best.filename={self.filename}: of several must be a name without braces")
        self.best_name = self.filename
        self.filename = f"{self.best_name}-{{step}}"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._name_best(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._name_best(trainer)

    def _name_best(self, trainer: L.Trainer) -> None:
        if self.best_name and trainer.is_global_zero and self.best_model_path not in ("", self._named):
            best = Path(self.best_model_path)
            second_name(best, best.with_name(f"{self.best_name}{self.FILE_EXTENSION}"))
            self._named = self.best_model_path
