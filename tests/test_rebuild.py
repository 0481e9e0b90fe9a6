"""What trains can be loaded; what could not be is refused before it trains."""

import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, refused
from tiny import configs
from torch import nn

from pixelcnn_lit.checkpoints.budget import MemoryBudget
from pixelcnn_lit.checkpoints.load import require_loadable
from pixelcnn_lit.classifiers.networks import ResNet
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.models.pixelcnn import PixelCNN

TINY = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.log_every_n_steps=1"]
TINY += ["dataset.num_workers=0", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
SMALL = ["model_size=tiny", "sampler.n_per_class=1"]


FACTS = {"image_shape": [1, 4, 4], "num_classes": 3, "levels": 17, "class_names": [], "label": "", "dataset": {}}


class Rate(nn.Module):
    """A class inside a class, which reads the value of a tensor, too."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.p = 1 - torch.tensor(1 - rate).item()


class ByList(PixelCNN):
    """The usual line of stochastic depth."""

    def __init__(self, dropout: float = 0.2, **own) -> None:
        super().__init__(**own)
        rates = torch.linspace(0, dropout, len(self.blocks)).tolist()
        self.rates = nn.ModuleList(Rate(rate) for rate in rates)
        for block, rate in zip(self.blocks, self.rates, strict=True):
            block.dropout.p = rate.p


class ByItem(PixelCNN):
    def __init__(self, dropout: float = 0.2, **own) -> None:
        super().__init__(**own)
        for block, rate in zip(self.blocks, torch.linspace(0, dropout, len(self.blocks)), strict=True):
            block.dropout.p = float(rate) if rate > 0 else 0.0


class ByArray(PixelCNN):
    def __init__(self, dropout: float = 0.2, **own) -> None:
        super().__init__(**own)
        for block, rate in zip(self.blocks, torch.linspace(0, dropout, len(self.blocks)).numpy(), strict=True):
            block.dropout.p = float(rate)


class Forgetful(PixelCNN):
    """Wider each time it is made."""

    made = 0

    def __init__(self, hidden_channels: int, **own) -> None:
        Forgetful.made += 1
        super().__init__(hidden_channels=hidden_channels + Forgetful.made, **own)


class Greedy(PixelCNN):
    """Keeps a thousand times as much as its weights."""

    def __init__(self, **own) -> None:
        super().__init__(**own)
        self.register_buffer("large", torch.empty(2**28), persistent=False)


class Judge(ResNet):
    def __init__(self, dropout: float = 0.2, **own) -> None:
        super().__init__(**own)
        self.rates = torch.linspace(0, dropout, 3).tolist()


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """`pixelcnn_lit.models.mine`, a file of somebody's own."""
    module = types.ModuleType("pixelcnn_lit.models.mine")
    for own in (ByList, ByItem, ByArray, Forgetful, Greedy, Judge):
        monkeypatch.setattr(own, "__module__", module.__name__)
        setattr(module, own.__name__, own)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def density(name: str, **facts) -> Density:
    own = configs("pixelcnn", "categorical", n_residual=3)
    own["model"] = {key: own["model"][key] for key in ("hidden_channels", "n_residual", "embedding")}
    own["model"]["_target_"] = f"pixelcnn_lit.models.mine.{name}"
    return Density(**own, **FACTS | facts)


@pytest.mark.parametrize("name", ["ByList", "ByItem", "ByArray"])
def test_a_network_whose_constructor_reads_values_is_trained_and_loaded(tmp_path, name):
    target = f"model._target_=pixelcnn_lit.models.mine.{name}"
    command("train", *TINY, *SMALL, target, "model.dropout=0.3", f"run_dir={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    model = load(result["checkpoint"])
    assert [block.dropout.p for block in model.network.blocks] == pytest.approx([0, 0.3])
    saved = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"density.{name}"], weight) for name, weight in model.state_dict().items())
    command("sample", f"ckpt={result['checkpoint']}", "sampler.n_per_class=1", f"run_dir={tmp_path}/samples")


def test_a_network_of_a_package_that_is_trusted_is_trained_and_loaded(tmp_path, monkeypatch):
    (tmp_path / "somebody.py").write_text(
        "from pixelcnn_lit.models.pixelcnn import PixelCNN\nclass Net(PixelCNN): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train = ["train", *TINY, *SMALL, "model._target_=somebody.Net", f"run_dir={tmp_path}/run"]
    assert refused(*train).endswith("put PIXELCNN_LIT_TRUST=PACKAGE into the environment")
    monkeypatch.setenv("PIXELCNN_LIT_TRUST", "others, somebody")
    command(*train)
    assert type(load(f"{tmp_path}/run").network).__module__ == "somebody"
    monkeypatch.setenv("PIXELCNN_LIT_TRUST", "some")
    with pytest.raises(UserError, match=r"somebody\.Net: not a Module"):
        load(f"{tmp_path}/run")


def test_a_classifier_whose_constructor_reads_values_is_trained_and_tested(tmp_path):
    own = ["classifier._target_=pixelcnn_lit.models.mine.Judge", "classifier.width=8", "classifier.n_residual=1"]
    command("train_classifier", *TINY, *own, f"run_dir={tmp_path}")
    assert (tmp_path / "result.json").is_file()


@pytest.mark.parametrize(("name", "cause"), [("Forgetful", "size mismatch"), ("Greedy", "it asks for more than 5")])
def test_what_could_not_be_loaded_is_refused_before_it_trains(tmp_path, name, cause):
    with pytest.raises(SystemExit) as stop:
        command("train", *TINY, *SMALL, f"model._target_=pixelcnn_lit.models.mine.{name}", f"run_dir={tmp_path}")
    assert str(stop.value.code).startswith("error: model: cannot be built again from its settings")
    assert cause in str(stop.value.code)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "config.yaml").exists()


def test_settings_that_a_checkpoint_cannot_hold_are_refused_before_training():
    for names, loadable in ((["a", "b", "c"], True), (list(np.array(["a", "b", "c"])), False)):
        model = density("ByList", class_names=names)
        with nullcontext() if loadable else pytest.raises(UserError, match="cannot be built again"):
            require_loadable(model, model.settings)


def test_to_ask_whether_it_can_be_loaded_draws_no_number():
    model = density("ByList")
    before = torch.get_rng_state()
    require_loadable(model, model.settings)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.zeros(2**28),
        lambda: torch.randn(2**28, generator=torch.Generator()),
        lambda: torch.zeros(1).expand(2**28).contiguous(),
        lambda: torch.ones(2**14)[:, None] * torch.ones(2**14),
        lambda: torch.zeros(2**10).repeat(2**18),
        lambda: [torch.zeros(()) for _ in range(1000)],
    ],
)
def test_what_goes_beyond_a_budget_is_refused_before_it_is_made(ask):
    with MemoryBudget(2**20):
        x = torch.randn(2**10)
        assert x.view(32, 32).add_(1).mul_(0).sum().item() == 0
        with pytest.raises(MemoryError):
            ask()


def test_checkpoints_in_float64_are_loaded_as_they_are(tmp_path):
    model = density("ByList").double()
    path: Path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": model.settings, "state_dict": model.state_dict()}, path)
    x, y = torch.randint(17, (3, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 2])
    assert torch.equal(load(str(path)).nats(x, y), model.eval().nats(x, y))
