"""The one LightningModule for every density network, and loading it from a checkpoint."""

import math
from typing import Annotated, Any

import lightning as L
import torch
from torch import Tensor, nn

from pixelcnn_lit.checkpoints.load import rebuild
from pixelcnn_lit.config.build import Range, build
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.lit.metrics import MeanNats, bits, share_buffers
from pixelcnn_lit.nn.layers import recompute_blocks
from pixelcnn_lit.optim.schedulers import optimization
from pixelcnn_lit.runs.machine import on_threads
from pixelcnn_lit.samplers.draw import Request

# What is scored or sampled in float32 is float32: CUDA's convolutions otherwise keep 10 bits of the mantissa (TF32).
torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


class DensityModel(L.LightningModule):
    """log p(x | y) of images, trained by maximum likelihood.

    All arguments are plain values; they are stored in the checkpoint, which therefore rebuilds itself.

    Args:
        model, likelihood: configs of the network and of what happens inside a pixel.
        image_shape, num_classes, levels, class_names: facts of the data.
        label: the dataset's name with all that was changed in it.
        dataset: config of the dataset, for `evaluate`.
        optimizer, scheduler: configs; a scheduler of None keeps the learning rate.
        label_dropout: share of training images whose class is hidden from the network.
        channels_last: memory format of weights and activations.
        gradient_checkpointing: keep of each block its input alone; the backward pass computes the rest again.
        compile: compile the training loss.
    """

    TITLE = "density model"
    LOSS = "nll"  # how the loss of training and validation is logged
    MONITOR = ("val/nll", "min")  # which checkpoint is the best
    IDENTITY = ("model", "likelihood")  # what a run that goes on must share with its checkpoint

    def __init__(
        self,
        *,
        model: dict[str, Any],
        likelihood: dict[str, Any],
        image_shape: list[int],
        num_classes: int,
        levels: int,
        class_names: list[str],
        label: str,
        dataset: dict[str, Any],
        optimizer: dict[str, Any],
        scheduler: dict[str, Any] | None = None,
        label_dropout: Annotated[float, Range(0, 1)] = 0.0,
        channels_last: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if image_shape[0] not in (1, 3):  # a stranger's file may ask for a table or a head for each of a billion
            raise UserError(f"image_shape={image_shape}: must begin with 1 channel (grey) or 3 (RGB)")
        data = {"image_shape": tuple(image_shape), "levels": levels}
        self.likelihood: Any = build("likelihood", likelihood, nn.Module, **data)
        self.net: nn.Module = build(
            "model", model, nn.Module, **data, num_classes=num_classes, out_channels=self.likelihood.out_channels
        )
        self.image_shape, self.num_classes, self.levels = tuple(image_shape), num_classes, levels
        self.dims = math.prod(image_shape)
        self.score, self.images_scored, self.figures = MeanNats(num_classes), 0, {}
        self.optimizer_config, self.scheduler_config, self.label_dropout = optimizer, scheduler, label_dropout
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if gradient_checkpointing and not recompute_blocks(self.net):
            raise UserError(
                "gradient_checkpointing=true: this network has no blocks that can be computed twice, as those of "
                "model.norm=batch cannot; type gradient_checkpointing=false"
            )
        # Training alone: scores, in float32 and eval mode, would be compiled anew.
        self.training_nats = torch.compile(type(self).nats) if compile else type(self).nats

    @property
    def classes(self) -> list[int]:
        """The classes to draw: all of them, or "no class" alone for an unconditional model."""
        return self.known_classes[: self.num_classes]

    @property
    def knows_classes(self) -> bool:
        """False of an unconditional model."""
        return self.classes != [self.num_classes]

    @property
    def known_classes(self) -> list[int]:
        """The classes it was trained on; `num_classes` ("no class") where the class was hidden from it at times."""
        if not self.hparams["model"].get("conditional", True):
            return [self.num_classes]
        return list(range(self.num_classes + (self.label_dropout > 0)))

    def numbers_of(self, setting: str, classes: list[int | str]) -> list[int]:
        """The numbers of classes that a `setting` asks for, by name or, where none has that name, by number.

        Raises UserError unless the model was trained on them.
        """
        names = self.hparams["class_names"]
        numbers: list[Any] = [names.index(str(one)) if str(one) in names else one for one in classes]
        if not numbers or not set(numbers) <= set(self.known_classes):
            called = {n: name if name == str(n) else f"{name} ({n})" for n, name in enumerate(names)}
            known = ", ".join(called.get(n, f"no class ({n})") for n in self.known_classes)
            raise UserError(f"{setting}: this model was trained on {known if self.knows_classes else 'no classes'}")
        return numbers

    def nats(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(x | y) of uint8 [B,C,H,W] and int64 [B], in nats an image [B]."""
        return -self.likelihood.log_prob(self.net(x, y), x).sum((1, 2, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        if self.label_dropout:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.label_dropout, self.num_classes)
        nll = self.training_nats(self, x, y).mean() / self.dims
        self.log("train/nll_step", nll, prog_bar=True)
        return nll

    def epoch_line(self, loss: float, figures: dict[str, Tensor]) -> str:
        """What an epoch has brought, from its mean loss and the last scores."""
        marked = "" if self.net.train_is_likelihood else " (no likelihood)"
        scored = f", val {figures['val/bpd']:.4f}" if "val/bpd" in figures else ""
        return f"train {bits(loss):.4f}{marked}{scored} bpd"

    @staticmethod
    def best_figure(score: float) -> dict[str, float]:
        """The best score as the HPARAMS page shows it."""
        return {"best/val_bpd": bits(score)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["scored"] = self.images_scored, self.figures

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_scored, self.figures = checkpoint["scored"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        x, y = batch
        with torch.autocast(self.device.type, enabled=False):  # reported figures are float32, however it trains
            self.score.update(self.nats(x, y), y)

    def on_validation_epoch_start(self) -> None:
        # Sums over many images want float64, which Apple's GPUs lack.
        self.score.set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
        share_buffers(self.trainer, self.net)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        per_image, per_class, images = self.score.compute()
        self.images_scored = int(images)
        self.score.reset()
        nll = float(per_image) / self.dims
        self.figures = {f"{split}/nll": nll, f"{split}/bpd": bits(nll)}  # Lightning's log rounds to float32
        if self.levels == 2:
            self.figures[f"{split}/nats_per_image"] = float(per_image)
        self.log_dict(self.figures, prog_bar=True, sync_dist=True)  # every rank has the same by now
        self.bpd_per_class = bits(per_class / self.dims).reshape(-1).tolist()  # torchmetrics squeezes that of one class

    def configure_optimizers(self) -> Any:
        return optimization(self, self.optimizer_config, self.scheduler_config, monitor="val/nll")

    def draw(self, sampler: dict[str, Any], classes: list[int] | None = None, threads: int = 1, **own: Any) -> Tensor:
        """`sampler["n_per_class"]` images of each class, uint8 [K,n,C,H,W] on this device; `own`: as in `Request`.

        Steps are many and small: on several `threads`, all wait for each of them whenever another program runs.
        """
        y = torch.tensor(self.classes if classes is None else classes, device=self.device)
        facts = self.net, self.likelihood, y, self.image_shape, self.num_classes, self.known_classes
        with on_threads(threads):
            return build("sampler", sampler, Tensor, request=Request(*facts, **own))


def load(path: str) -> DensityModel:
    """The density model of a .ckpt or .safetensors file: see `rebuild`."""
    return rebuild(path, DensityModel, compile=False)
