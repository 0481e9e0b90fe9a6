"""Optimizers, and learning rates over a run."""

import inspect
import math
from typing import Annotated, Any

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pixelcnn_lit.build import Range, build, resolve
from pixelcnn_lit.errors import UserError


def optimization(
    module: L.LightningModule, optimizer: dict[str, Any], scheduler: dict[str, Any] | None, monitor: str
) -> dict[str, Any]:
    """What a module's `configure_optimizers` returns, from the configs of optimizer and scheduler.

    A scheduler that takes `total_steps` moves every step, any other every epoch; ReduceLROnPlateau reads `monitor`, and
    moves when that has been validated.
    """
    built: dict[str, Any] = {"optimizer": build("optimizer", optimizer, Optimizer, params=module.parameters())}
    if not scheduler:
        return built
    target = resolve(scheduler["_target_"], LRScheduler)
    total, validated = "total_steps" in inspect.signature(target).parameters, target is ReduceLROnPlateau
    facts = {"total_steps": _total_steps(module.trainer)} if total else {}
    built["lr_scheduler"] = {
        "scheduler": build("scheduler", scheduler, LRScheduler, optimizer=built["optimizer"], **facts),
        "interval": "step" if total else "epoch",
        "frequency": (module.trainer.check_val_every_n_epoch or 1) if validated else 1,
        "monitor": monitor,
    }
    return built


def _total_steps(trainer: L.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise UserError("this scheduler must know where the run ends; type trainer.max_epochs or trainer.max_steps")
    return int(steps)


class WarmupCosine(LambdaLR):
    """From 1/25 of the optimizer's learning rate up to it along half a cosine, then down to zero along another.

    The course of torch's OneCycleLR, which however divides by zero at 20 steps and cannot be extended: here
    `total_steps` is the present run's, not saved with it, so that a run that goes on follows the longer course.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup: share of them on the way up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Annotated[float, Range(0, 1)] = 0.05) -> None:
        top = max(0.0, warmup * total_steps - 1)

        def factor(step: int) -> float:
            if step < top:
                return _half_cosine(1 / 25, 1, step / top)
            return _half_cosine(1, 0, min(1.0, (step - top) / max(1.0, total_steps - 1 - top)))

        super().__init__(optimizer, factor)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
