"""The LightningModule that trains and scores a density."""

from typing import Any

import torch
from torch import Tensor, nn

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import TRAINING
from pixelcnn_lit.lit.metrics import MeanNats, share_buffers
from pixelcnn_lit.lit.trainable import Trainable
from pixelcnn_lit.optim.schedulers import optimization


class DensityModule(Trainable):
    """Train a `Density` by maximum likelihood, and score it.

    Args:
        density: whose settings are stored in checkpoints, with those below.
        optimizer, scheduler: configs; a scheduler of None keeps the learning rate. Without an optimizer it can score.
        channels_last: memory format of weights and activations.
        gradient_checkpointing: keep of each block its input alone; the backward pass computes the rest again.
        compile: compile the training loss.
    """

    FIGURE = "bpd"
    LOSS = "nll"
    MONITOR = ("val/nll", "min")
    IDENTITY = Density.IDENTITY

    def __init__(
        self,
        density: Density,
        *,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        channels_last: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        own = {"optimizer": optimizer, "scheduler": scheduler, "channels_last": channels_last}
        own |= {"gradient_checkpointing": gradient_checkpointing, "compile": compile}
        assert own.keys() == set(TRAINING), "name it in density.load, or no checkpoint could be loaded"
        self.save_hyperparameters(density.settings | own)
        self.density = density
        self.score = MeanNats(density.num_classes)
        self.figures = {}
        self.optimizer_config = optimizer
        self.scheduler_config = scheduler
        if channels_last:
            density.to(memory_format=torch.channels_last)
        if gradient_checkpointing and not density.checkpoint_blocks():
            raise UserError(
                "gradient_checkpointing=true: this network has no blocks that can be computed twice, as those with "
                "BatchNorm cannot; type gradient_checkpointing=false"
            )
        # Training alone: scores, in float32 and eval mode, would be compiled anew.
        self.training_nats = torch.compile(density.forward) if compile else density.forward

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        if self.density.label_dropout:
            hidden = torch.rand(y.shape, device=y.device) < self.density.label_dropout
            y = y.masked_fill(hidden, self.density.no_class)
        nll = self.training_nats(x, y).mean() / self.density.dims
        self.log_dict({f"train/{name}_step": value for name, value in self.training_figures(nll.detach()).items()})
        return nll

    def training_figures(self, loss: Tensor) -> dict[str, Tensor]:
        return {"bpd": bits(loss), "nll": loss}

    def stored(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.density, self.density.settings

    def epoch_line(self, loss: float, figures: dict[str, Tensor]) -> str:
        marked = "" if self.density.network.train_is_likelihood else " (no likelihood)"
        scored = f", val {figures['val/bpd']:.4f}" if "val/bpd" in figures else ""
        return f"train {bits(loss):.4f}{marked}{scored} bpd"

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        x, y = batch
        with torch.autocast(self.device.type, enabled=False):  # reported figures are float32, however it trains
            self.score.update(self.density(x, y), y)

    def on_validation_epoch_start(self) -> None:
        # Sums over many images want float64, which Apple's GPUs lack.
        self.score.set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
        share_buffers(self.trainer, self.density)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        scored = self.score.compute()
        self.score.reset()
        dims = self.density.dims
        nll = float(scored.mean) / dims
        figures: dict[str, Any] = {f"{split}/nll": nll, f"{split}/bpd": bits(nll)}
        if self.density.levels == 2:
            figures[f"{split}/nats_per_image"] = float(scored.mean)
        self.log_dict(figures, sync_dist=True)  # every rank has the same by now
        error = bits(float(scored.standard_error) / dims) if scored.images > 1 else None  # JSON knows no NaN
        beside = {f"{split}/bpd_standard_error": error, f"{split}/images": int(scored.images)}
        self.figures = figures | beside  # Lightning's log rounds to float32
        per_class_bpd = bits(scored.per_class / dims)
        self.bpd_per_class = per_class_bpd.reshape(-1).tolist()  # torchmetrics squeezes that of one class

    def configure_optimizers(self) -> Any:
        assert self.optimizer_config is not None
        return optimization(self, self.optimizer_config, self.scheduler_config, monitor="val/nll")
