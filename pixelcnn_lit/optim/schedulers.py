"""Optimizers, and learning rates over a run."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from torch import nn, optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pixelcnn_lit.config.build import build, inspect_config, resolve
from pixelcnn_lit.config.errors import UserError

if TYPE_CHECKING:
    import lightning as L


def optimization(
    module: "L.LightningModule", optimizer: dict[str, Any], scheduler: dict[str, Any] | None, monitor: str
) -> dict[str, Any]:
    """Return what a module's `configure_optimizers` returns, from the configs of optimizer and scheduler.

    A scheduler that takes `total_steps` moves every step, any other every epoch; one that takes `time_share` learns how
    much of trainer.max_time is over; ReduceLROnPlateau reads `monitor`, and moves when that has been validated.
    """
    refuse_unfit(optimizer, module)
    built: dict[str, Any] = {"optimizer": build("optimizer", optimizer, Optimizer, params=module.parameters())}
    if not scheduler:
        return built
    target = resolve(scheduler["_target_"], LRScheduler)
    takes, validated = inspect.signature(target).parameters, target is ReduceLROnPlateau
    facts: dict[str, Any] = {"total_steps": _total_steps(module.trainer)} if "total_steps" in takes else {}
    if "time_share" in takes:
        facts["time_share"] = partial(_time_share, module.trainer)
    built["lr_scheduler"] = {
        "scheduler": build("scheduler", scheduler, LRScheduler, optimizer=built["optimizer"], **facts),
        "interval": "step" if "total_steps" in takes else "epoch",
        "frequency": (module.trainer.check_val_every_n_epoch or 1) if validated else 1,
        "monitor": monitor,
    }
    return built


def refuse_unfit(config: dict[str, Any], module: nn.Module) -> None:
    """Raise UserError for those of torch's own optimizers that cannot train such a module, and say what can."""
    optimizer, _ = inspect_config("optimizer", config, Optimizer, ["params"])
    unfit: dict[Any, str] = {
        optim.Muon: "takes matrices alone; type optimizer=muon, which takes all weights",
        optim.SparseAdam: "takes sparse gradients alone; type optimizer=adam",
    }
    if not all(parameter.is_contiguous() for parameter in module.parameters()):
        unfit[optim.LBFGS] = "takes contiguous weights alone; type optimizer=adamw, or channels_last=false of `train`"
    if optimizer in unfit:
        raise UserError(f"optimizer._target_={config['_target_']}: {unfit[optimizer]}")


def _total_steps(trainer: "L.Trainer") -> int:
    steps = trainer.estimated_stepping_batches
    if steps == math.inf and not _clocks(trainer):
        raise UserError(
            "this scheduler must know where a run ends; type trainer.max_epochs, trainer.max_steps or trainer.max_time"
        )
    return int(min(steps, 10**9))  # a run that ends by the time alone never gets there


def _clocks(trainer: "L.Trainer") -> list[tuple[float, float]]:
    # Not above: the settings of a scheduler are checked without Lightning.
    from pixelcnn_lit.runs.lightning_internals import clocks

    return clocks(trainer)


def _time_share(trainer: "L.Trainer") -> float:
    """Return how much of trainer.max_time is over; 0 without one. Every process gets the first one's."""
    shares = [over / max(over + left, 1e-9) for over, left in _clocks(trainer)]
    return trainer.strategy.broadcast(max(shares)) if shares else 0.0


class WarmupCosine(LambdaLR):
    """From 1/25 of the optimizer's learning rate up to it along half a cosine, later down to zero along another.

    A run is as far as its steps are, or its time, whichever is further. A `hold` keeps the full pace until it must end:
    Hägele et al. 2024 (arXiv 2405.18392), section 3.

    Without one the course of torch's OneCycleLR, which however divides by zero at 20 steps and cannot be extended: here
    `total_steps` is the present run's, not saved with it, so that a resumed run follows the longer course.

    Args:
        total_steps: optimizer steps of the whole run.
        time_share: how much of the run's time is over, 0 to 1.
        warmup: share of the run on the way up.
        hold: share of the rest at the top.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        time_share: Callable[[], float] = lambda: 0.0,
        warmup: Annotated[float, Interval(ge=0, le=1)] = 0.05,
        hold: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    ) -> None:
        last, self.began = total_steps - 1, 0.0
        up = max(0.0, warmup * total_steps - 1)
        down = up + hold * (last - up)

        def factor(step: int) -> float:
            share = time_share()
            if step == 1:  # the first step may have taken long: it compiles the loss
                self.began = share
            at = max(step, (share - self.began) / max(1 - self.began, 1e-9) * last)
            if at < up:
                return _half_cosine(1 / 25, 1, at / up)
            return _half_cosine(1, 0, min(1.0, max(0.0, at - down) / max(1.0, last - down)))

        super().__init__(optimizer, factor)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
