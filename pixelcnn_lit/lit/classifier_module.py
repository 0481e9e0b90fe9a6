"""The LightningModule for every classifier, and loading it from a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from pixelcnn_lit.checkpoints.load import load_module
from pixelcnn_lit.checkpoints.read import require_same
from pixelcnn_lit.classifiers.protocols import Classifier, OwnScale, Pretrained
from pixelcnn_lit.config.build import build
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.lit.metrics import accuracy, share_buffers
from pixelcnn_lit.lit.trainable import Trainable
from pixelcnn_lit.optim.schedulers import optimization


class ClassifierModule(Trainable):
    """p(y | x) of images, trained by cross-entropy.

    All arguments are plain values; they are stored in the checkpoint, which therefore rebuilds itself.

    Args:
        classifier: config of the network.
        mean, std: of each channel over the training images, as shares of the brightest level.
        image_shape, num_classes, levels, class_names: facts of the data.
        label: the dataset's name with all that was changed in it.
        dataset: config of the dataset.
        optimizer, scheduler: configs; a scheduler of None keeps the learning rate.
    """

    TITLE = "classifier"
    FIGURE = "accuracy"
    LOSS = "loss"
    MONITOR = ("val/accuracy", "max")
    IDENTITY = ("classifier",)

    net: Classifier
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        classifier: dict[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        image_shape: list[int],
        num_classes: int,
        levels: int,
        class_names: list[str],
        label: str,
        dataset: dict[str, Any],
        optimizer: dict[str, Any],
        scheduler: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        shape = tuple(image_shape)
        self.net = build("classifier", classifier, nn.Module, image_shape=shape, num_classes=num_classes)
        if not isinstance(self.net, Classifier):
            raise UserError(
                f"classifier: {classifier['_target_']} needs body and head, as Classifier in "
                "pixelcnn_lit/classifiers/protocols.py says"
            )
        mean, std = (self.net.mean, self.net.std) if isinstance(self.net, OwnScale) else (mean, std)
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        self.levels, self.figures = levels, {}
        self.optimizer_config, self.scheduler_config = optimizer, scheduler
        self.confusion: Metric = MulticlassConfusionMatrix(num_classes)
        self.loss: Metric = MeanMetric(nan_strategy="disable")
        self.example_input_array = torch.zeros(1, *shape, dtype=torch.uint8)  # for the summary of the model
        self.to(memory_format=torch.channels_last)

    def load_pretrained(self) -> None:
        """Let the network start from weights that were trained elsewhere, if it does. Raises UserError."""
        if isinstance(self.net, Pretrained):
            self.net.load_pretrained()

    def scaled(self, x: Tensor) -> Tensor:
        """Images uint8 [B,C,H,W] as the network takes them."""
        return ((x.float() / (self.levels - 1) - self.mean) / self.std).to(self.mean.dtype)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads of images uint8 [B,C,H,W]: [B,F]."""
        return self.net.body(self.scaled(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,num_classes] of images uint8 [B,C,H,W], in float32 or finer."""
        logits = self.net.head(self.features(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss_step", loss.detach())
        return loss

    def training_figures(self, loss: Tensor) -> dict[str, Tensor]:
        return {"loss": loss}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        x, y = batch
        with torch.autocast(self.device.type, enabled=False):
            logits = self(x)
        self.confusion.update(logits, y)
        self.loss.update(F.cross_entropy(logits, y), weight=len(y))

    def on_validation_epoch_start(self) -> None:
        share_buffers(self.trainer, self)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        self.counted: Tensor = self.confusion.compute().cpu()  # [class, class that it was taken for]
        figures = {f"{split}/accuracy": accuracy(self.counted), f"{split}/loss": float(self.loss.compute())}
        self.confusion.reset()
        self.loss.reset()
        self.figures = figures | {f"{split}/images": int(self.counted.sum())}
        self.log_dict(figures, sync_dist=True)

    def stored(self) -> tuple[nn.Module, dict[str, Any]]:
        return self, dict(self.hparams)

    def epoch_line(self, loss: float, figures: dict[str, Tensor]) -> str:
        scored = f", val {figures['val/accuracy']:.2%}" if "val/accuracy" in figures else ""
        return f"train loss {loss:.4f}{scored}"

    def configure_optimizers(self) -> Any:
        return optimization(self, self.optimizer_config, self.scheduler_config, monitor="val/loss")


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def load_classifier(path: str, facts: dict[str, Any] | None = None) -> ClassifierModule:
    """Return the classifier of a .ckpt file: see `load_module`. Raises UserError if its images have other `facts`."""
    classifier: ClassifierModule = load_module(path, ClassifierModule)
    require_same(path, dict(classifier.hparams), facts or {}, "classifier_ckpt")
    return classifier
