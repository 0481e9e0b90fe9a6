"""The checkpoints that are best on validation."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from pixelcnn_lit.runs.atomic import second_name


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also keeps several: the best as `filename`, and all with their step behind it.

    With save_top_k=3 these are best.ckpt, a second name of the first of best-120.ckpt, best-80.ckpt and best-160.ckpt.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert self.filename is not None
        self.best_name, _, _ = self.filename.partition("-{step}")
        if self.save_top_k != 1:  # Lightning would write all of them to one file, the worse over the better
            self.filename = f"{self.best_name}-{{step}}"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._name_best(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._name_best(trainer)

    def _name_best(self, trainer: L.Trainer) -> None:
        best = Path(self.best_model_path)
        if trainer.is_global_zero and best.is_file():
            second_name(best, best.with_name(f"{self.best_name}{self.FILE_EXTENSION}"))
