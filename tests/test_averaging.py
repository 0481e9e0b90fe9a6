"""The average of the weights."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from pixelcnn_lit.optim.ema import EMA


class Steps(L.LightningModule):
    """A weight, and a count."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


def average_of(n_steps: int, decay: float) -> dict[str, torch.Tensor]:
    """The averaged state after weights 0, 1, ..., n_steps - 1."""
    module, ema = Steps(), EMA(decay)
    ema.setup(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), module, "fit")
    average = ema._average_model
    assert average is not None
    for step in range(n_steps):
        module.weight.data.fill_(step)
        module.count.fill_(step)
        average.update_parameters(module)
    return average.module.state_dict()


@pytest.mark.parametrize(("n_steps", "decay"), [(1, 0.9), (2, 0.9), (50, 0.99), (300, 0.9)])
def test_it_is_the_weighted_sum_it_says(n_steps, decay):
    share, total = 1.0, 0.0  # share of the weights up to n in the average
    for n in reversed(range(n_steps)):
        kept = min(decay, n / (n + 9))
        total, share = total + n * share * (1 - kept), share * kept
    average = average_of(n_steps, decay)
    assert average["weight"].item() == pytest.approx(total, rel=1e-6)
    assert average["count"] == n_steps - 1


def test_it_lies_where_the_model_will_be():
    """Lightning moves the model after the callbacks are set up: an average that stayed behind is copied every step."""
    module, ema = Steps(), EMA()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")), precision="32-true")
    ema.setup(trainer, module, "fit")
    average = ema._average_model
    assert average is not None
    assert average.module.weight.is_meta
    assert not module.weight.is_meta


def test_it_looks_back_a_tenth_of_a_run_or_as_far_as_its_decay_says():
    def lag(n: int, decay: float) -> float:
        return n - 1 - average_of(n, decay)["weight"].item()

    assert lag(100, 0.999) == pytest.approx(10, abs=1)
    assert lag(1000, 0.999) == pytest.approx(100, abs=1)
    assert lag(1000, 0.9) == pytest.approx(9, abs=0.1)


def test_the_average_is_finer_than_coarse_weights_and_a_validation_leaves_both_as_they_were():
    module, ema = Steps(), EMA()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="bf16-true")
    ema.setup(trainer, module.float(), "fit")
    average = ema._average_model
    assert average is not None
    module.bfloat16()  # which Lightning does once the callbacks are set up
    for weight in (1.0, 1.0078125):
        module.weight.data.fill_(weight)
        average.update_parameters(module)
    kept = average.module.weight.detach().clone()
    assert kept.dtype == torch.float32
    assert 1 < kept < 1.0078125  # which bf16 has nothing between
    assert kept.item() == pytest.approx(1 + 0.0078125 * 9 / 10, abs=1e-6)
    ema.on_validation_epoch_start(trainer, module)
    assert torch.equal(module.weight, kept.bfloat16())
    ema.on_validation_epoch_end(trainer, module)
    assert module.weight == 1.0078125
    assert torch.equal(average.module.weight, kept)
