"""Each flag of Lightning's Trainer, with every default callback: a run that leaves its result, or one line before it.

And the optimizers, schedulers and callbacks of torch and Lightning, by their public names.
"""

import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from helpers import command
from hydra import compose, initialize_config_dir
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf
from torch.optim import Optimizer, lr_scheduler

import pixelcnn_lit.train
import pixelcnn_lit.train_classifier
from pixelcnn_lit.config.build import resolve
from pixelcnn_lit.config.errors import UserError, explain
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.optim.schedulers import optimization
from pixelcnn_lit.runs.command import CONF
from pixelcnn_lit.runs.saved import NOT_SAVED
from pixelcnn_lit.training.callbacks import TrainingLoss
from pixelcnn_lit.training.fit import build_callback
from pixelcnn_lit.training.run import Run

BATCHES = ["trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=2", "trainer.limit_train_batches=2"]
BATCHES += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"]
BATCHES += ["dataset.num_workers=0", "dataset.batch_size=8"]
TINY = {
    "train": ["model.hidden_channels=4", "model.n_residual=1", "sampler.n_per_class=1"],
    "train_classifier": ["classifier.width=8", "classifier.n_residual=1"],
}
RUNS: list[dict[str, Any]] = [  # each ends in a result
    {"precision": "64-true", "detect_anomaly": True, "num_sanity_val_steps": 2, "min_epochs": 3},
    {"precision": "bf16-true", "val_check_interval": 1, "accumulate_grad_batches": 3, "min_steps": 5},
    {"precision": "bf16-mixed", "val_check_interval": 0.5, "max_steps": 3, "num_sanity_val_steps": -1},
    {"precision": "16-mixed", "val_check_interval": None, "check_val_every_n_epoch": 2, "num_sanity_val_steps": None},
    {"precision": "auto", "accelerator": "auto", "devices": "auto", "overfit_batches": 1, "fast_dev_run": False},
    {"precision": 64, "overfit_batches": 0.05, "max_time": "00:00:10:00", "accumulate_grad_batches": 2},
    {"precision": "bf16", "val_check_interval": "00:01:00:00", "limit_train_batches": 0.02, "deterministic": True},
    {"val_check_interval": {"hours": 1}, "max_epochs": -1, "max_time": "00:00:00:01", "limit_val_batches": 0.1},
    {"precision": None, "val_check_interval": 3, "check_val_every_n_epoch": None, "strategy": "ddp"},
    {"precision": 32, "val_check_interval": 100, "check_val_every_n_epoch": None, "enable_progress_bar": True},
    {"val_check_interval": {"seconds": 0}, "limit_test_batches": None, "enable_progress_bar": None, "max_epochs": 1},
    {"gradient_clip_val": 0, "deterministic": "warn", "profiler": "simple", "benchmark": True, "sync_batchnorm": True},
    {"gradient_clip_algorithm": "value", "inference_mode": False, "log_every_n_steps": 0, "num_nodes": 1},
    {"reload_dataloaders_every_n_epochs": 1, "enable_autolog_hparams": False, "model_registry": "name"},
    {"limit_predict_batches": 0, "enable_checkpointing": True, "gradient_clip_val": None, "log_every_n_steps": None},
]
OWN = "is set by the program"
NONE = "leaves none of 32 batches to score; type 1.0 or a number"
REFUSED: list[tuple[str, Any, str]] = [  # a flag, a value, and what the line says
    *((flag, None, OWN) for flag in ("logger", "callbacks", "plugins", "default_root_dir")),
    *((flag, True, OWN) for flag in ("barebones", "enable_model_summary", "use_distributed_sampler")),
    ("accelerator", "abacus", "trainer=auto fits"),
    ("num_nodes", 0, "trainer: `num_nodes`"),
    ("precision", "16-true", "type callbacks=samples"),
    ("precision", 12, "trainer.precision=12: must be"),
    ("fast_dev_run", 2, "type trainer.max_steps=1"),
    ("max_epochs", 0, "type at least"),
    ("max_epochs", -1, "type trainer.max_epochs, trainer.max_steps or"),
    ("max_steps", 0, "nothing was trained"),
    ("max_steps", -2, "trainer: `max_steps`"),
    ("max_time", "00:00:00:00", "nothing was trained"),
    ("max_time", "soon", "trainer.max_time=soon: must be days:hours:minutes:seconds"),
    ("max_time", 30, "type trainer.max_time=00:00:10:00"),
    ("limit_train_batches", 0, "nothing was trained"),
    ("limit_train_batches", -1, "trainer: "),
    ("limit_train_batches", 1e-4, "limit_train_batches"),
    ("limit_val_batches", 0, f"trainer.limit_val_batches=0: {NONE}"),
    ("limit_val_batches", 0.001, f"trainer.limit_val_batches=0.001: {NONE}"),
    ("limit_test_batches", 0, f"trainer.limit_test_batches=0: {NONE}"),
    ("limit_test_batches", 0.001, f"trainer.limit_test_batches=0.001: {NONE}"),
    ("overfit_batches", 0.001, f"trainer.overfit_batches=0.001: {NONE}"),
    ("overfit_batches", -1, "trainer: "),
    ("val_check_interval", 0, "trainer.val_check_interval=0: must be above 0"),
    ("val_check_interval", 100, "val_check_interval"),
    ("check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch=0: must be above 0"),
    ("check_val_every_n_epoch", 3, "type at least"),
    ("check_val_every_n_epoch", None, "trainer: "),
    ("accumulate_grad_batches", 0, "trainer.accumulate_grad_batches=0: must be above 0"),
    ("enable_checkpointing", False, "enable_checkpointing=False"),
    ("gradient_clip_algorithm", "none", "trainer: `gradient_clip_algorithm`"),
    ("profiler", "watch", "trainer: "),
    ("reload_dataloaders_every_n_epochs", -1, "trainer: "),
]
AS_THE_MACHINE_HAS_IT = [  # a result or a line
    *(("accelerator", name) for name in ("gpu", "tpu", "mps")),
    *(("devices", value) for value in ([0], "0", -1, 0)),
    *(("precision", name) for name in ("transformer-engine", "transformer-engine-float16")),
    ("profiler", "xla"),
]


def test_no_flag_of_the_trainer_is_forgotten():
    tried = {flag for flags in RUNS for flag in flags} | {flag for flag, _, _ in REFUSED}
    assert tried == set(inspect.signature(L.Trainer).parameters)


@pytest.fixture(autouse=True)
def as_before():
    """What Lightning sets for a whole process is set back."""
    with patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def settings() -> dict[str, dict[str, Any]]:
    """The settings of a tiny run of each command."""
    composed = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, tiny in TINY.items():
            config = OmegaConf.to_container(compose(name, [*BATCHES, *tiny]), resolve=False)
            kept = OmegaConf.create({key: value for key, value in config.items() if key not in NOT_SAVED})
            composed[name] = OmegaConf.to_container(kept, resolve=True) | {"overrides": []}
    return composed


def outcome(directory: Path, settings: dict[str, Any], name: str = "train", **changed: Any) -> str | None:
    """None for a run that leaves its result, or the line that ends it before it has trained."""
    command = getattr(pixelcnn_lit, name)
    try:
        command.train(Run(directory, None, {}), **settings | changed)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        assert "\n" not in line
        assert not list(directory.rglob("*.ckpt"))
        return line
    assert json.loads((directory / "result.json").read_text())["steps"] > 0
    return None


@pytest.mark.parametrize("flags", RUNS, ids=str)
def test_flags_that_fit_end_in_a_result(tmp_path, settings, flags):
    own = settings["train"]
    assert outcome(tmp_path, own, trainer=own["trainer"] | flags) is None


@pytest.mark.parametrize(("flag", "value", "message"), REFUSED, ids=str)
def test_flags_that_do_not_get_one_line(tmp_path, settings, flag, value, message):
    own = settings["train"]
    line = outcome(tmp_path, own, trainer=own["trainer"] | {flag: value})
    assert line is not None
    assert message in line


@pytest.mark.parametrize(("flag", "value"), AS_THE_MACHINE_HAS_IT, ids=str)
def test_flags_that_some_machines_lack_get_one_line_there(tmp_path, settings, flag, value):
    own = settings["train"]
    outcome(tmp_path, own, trainer=own["trainer"] | {flag: value})


@pytest.mark.parametrize("strategy", sorted(set(StrategyRegistry.available_strategies()) - {"ddp"}))
def test_each_strategy_ends_in_a_result_or_in_one_line(tmp_path, settings, strategy):
    own = settings["train"]
    line = outcome(tmp_path, own, trainer=own["trainer"] | {"strategy": strategy})
    if any(way in strategy for way in ("spawn", "fork", "notebook")):
        assert line == f"trainer.strategy={strategy}: would fork or spawn this process; type ddp, which starts others"


@pytest.fixture(scope="module")
def checkpoint(settings, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("run")
    assert outcome(directory, settings["train"]) is None
    return json.loads((directory / "result.json").read_text())["checkpoint"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["trainer.precision=64-true", "+trainer.detect_anomaly=true", "trainer.overfit_batches=1"], None),
        (["trainer.precision=bf16-true", "+trainer.inference_mode=false", "+trainer.profiler=simple"], None),
        (["trainer.precision=16-true", "trainer.limit_test_batches=1", "trainer.max_steps=0"], None),
        (["trainer.limit_test_batches=0"], "trainer.limit_test_batches=0: leaves none of 2 batches to score"),
        (["+trainer.barebones=true"], OWN),
        (["trainer.strategy=ddp_fork"], "type ddp"),
    ],
    ids=str,
)
def test_evaluate_takes_the_flags_that_fit_and_refuses_others(tmp_path, checkpoint, flags, message):
    evaluate = [f"ckpt={checkpoint}", "trainer=cpu", "dataset.num_workers=0", "n_images=16", f"run_dir={tmp_path}"]
    if message is None:
        command("evaluate", *evaluate, *flags)
        assert json.loads((tmp_path / "evaluation.json").read_text())["nll"] == pytest.approx(np.log(17), abs=1)
    else:
        with pytest.raises(SystemExit, match=message):
            command("evaluate", *evaluate, *flags)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_classifier_is_trained_in_each_precision(tmp_path, settings, precision):
    own = settings["train_classifier"]
    assert outcome(tmp_path, own, "train_classifier", trainer=own["trainer"] | {"precision": precision}) is None


@pytest.mark.parametrize(
    ("precision", "likelihood"), [("16-true", 0), ("bf16-true", 0), ("64-true", 0), ("bf16-true", 1)]
)
def test_samples_are_drawn_in_each_precision_during_training_and_afterwards(tmp_path, settings, precision, likelihood):
    own = settings["train"]
    if likelihood:
        own = own | {
            "likelihood": {"_target_": "pixelcnn_lit.likelihoods.logistic_mixture.LogisticMixture", "n_mixtures": 3}
        }
    kept = {name: callback for name, callback in own["callbacks"].items() if name != "ema"}
    kept["samples"] = kept["samples"] | {"every_n_epochs": 1}
    flags = own["trainer"] | {"precision": precision}
    assert outcome(tmp_path, own, trainer=flags, callbacks=kept) is None
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test/nll"] == pytest.approx(np.log(17), abs=1)
    model = load(result["checkpoint"])
    assert next(model.parameters()).dtype == (torch.float64 if precision == "64-true" else torch.float32)
    for bf16 in (False, True):
        assert model.draw(own["sampler"] | {"bf16": bf16}).shape == (10, 1, 1, 8, 8)


def public(module: Any, kind: type) -> list[str]:
    """The names under which a module publishes classes of a kind, but for the kind itself."""
    found = {name: getattr(module, name) for name in module.__all__}
    return [name for name, own in found.items() if inspect.isclass(own) and issubclass(own, kind) and own is not kind]


@pytest.fixture
def module(settings) -> DensityModule:
    """A model with a trainer of four steps, for `optimization`."""
    facts = {"image_shape": [1, 4, 4], "num_classes": 2, "levels": 3, "class_names": ["a", "b"], "label": "none"}
    parts = {key: settings["train"][key] for key in ("model", "likelihood")}
    model: Any = DensityModule(Density(**parts, **facts))
    model._trainer = SimpleNamespace(estimated_stepping_batches=4, callbacks=[], check_val_every_n_epoch=1)
    return model


def line_or_step(model: DensityModule, optimizer: dict[str, Any], scheduler: dict[str, Any] | None) -> str | None:
    """None where a step is made, or the line that refuses."""
    try:
        built = optimization(model, optimizer, scheduler, monitor="val/nll")
    except UserError as error:
        return str(error)
    x, y = torch.randint(3, (2, 1, 4, 4), dtype=torch.uint8), torch.tensor([0, 1])

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model.density(x, y).mean()
        loss.backward()
        return loss

    before = [weight.clone() for weight in model.parameters()]
    built["optimizer"].step(closure)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return None


OPTIMIZERS = {
    "Muon": "takes matrices alone; type optimizer=muon, which takes all weights",
    "SparseAdam": "takes sparse gradients alone; type optimizer=adam",
    "LBFGS": "takes contiguous weights alone; type optimizer=adamw, or channels_last=false of `train`",
}


@pytest.mark.parametrize("name", public(torch.optim, Optimizer))
def test_each_optimizer_of_torch_is_found_by_its_public_name(module, name):
    target = f"torch.optim.{name}"
    line = line_or_step(module, {"_target_": target, "lr": 1e-3}, None)
    assert line == (f"optimizer._target_={target}: {OPTIMIZERS[name]}" if name in OPTIMIZERS else None)
    if name == "LBFGS":
        assert line_or_step(module.to(memory_format=torch.contiguous_format), {"_target_": target}, None) is None


SCHEDULERS: dict[str, tuple[dict[str, Any], str | None]] = {  # what each asks for, and what it then says
    "LambdaLR": ({"lr_lambda": 3}, "scheduler: 'int' object is not callable"),
    "MultiplicativeLR": ({"lr_lambda": None}, "scheduler: lr_lambda should be a function, but got NoneType"),
    "StepLR": ({"step_size": 1}, None),
    "MultiStepLR": ({"milestones": [1], "gamma": 0.5}, None),
    "ConstantLR": ({}, None),
    "LinearLR": ({}, None),
    "ExponentialLR": ({"gamma": 0.9}, None),
    "SequentialLR": ({"schedulers": [1], "milestones": [1]}, "scheduler.schedulers=[1]: must be a list"),
    "CosineAnnealingLR": ({"T_max": 2}, None),
    "ChainedScheduler": ({"schedulers": []}, "scheduler: ChainedScheduler expects"),
    "ReduceLROnPlateau": ({}, None),
    "CyclicLR": ({"base_lr": 1e-3, "max_lr": 1e-2}, None),
    "CosineAnnealingWarmRestarts": ({"T_0": 2}, None),
    "OneCycleLR": ({"max_lr": 1e-2}, None),
    "PolynomialLR": ({}, None),
}


@pytest.mark.parametrize("name", public(lr_scheduler, lr_scheduler.LRScheduler))
def test_each_scheduler_of_torch_is_found_by_its_public_name(module, name):
    own, message = SCHEDULERS[name]
    adam, scheduler = {"_target_": "torch.optim.Adam"}, {"_target_": f"torch.optim.lr_scheduler.{name}"}
    if own:
        assert "is missing; type scheduler." in str(line_or_step(module, adam, scheduler))
    line = line_or_step(module, adam, scheduler | own)
    assert line is None if message is None else message in str(line)


def test_a_value_is_checked_though_another_annotation_is_for_type_checkers_alone(module):
    scheduler = {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1], "gamma": "half"}
    line = line_or_step(module, {"_target_": "torch.optim.Adam"}, scheduler)
    assert line == "scheduler.gamma=half: must be a number"


CALLBACKS: dict[str, dict[str, Any]] = {  # what those that fit are told
    "EarlyStopping": {"monitor": "val/nll"},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "StochasticWeightAveraging": {"swa_lrs": 1e-2},
    **{name: {} for name in ("DeviceStatsMonitor", "LambdaCallback", "LearningRateMonitor", "ModelCheckpoint")},
    **{name: {} for name in ("Checkpoint", "ModelSummary", "SpikeDetection", "Timer", "BasePredictionWriter")},
}
REFUSED_CALLBACKS: dict[str, tuple[dict[str, Any], str]] = {  # and what others are answered
    "BackboneFinetuning": ({}, "callbacks.own: BackboneFinetuning requires a module with a backbone"),
    "BatchSizeFinder": ({}, "type a sweep: -m dataset.batch_size"),
    "LearningRateFinder": ({}, "type a sweep: -m optimizer.lr"),
    "ModelPruning": ({"pruning_fn": "l1_unstructured"}, "callbacks.own: ModelPruning puts other weights"),
}


@pytest.mark.parametrize("name", public(callbacks, L.Callback))
def test_each_callback_of_lightning_is_found_by_its_public_name(name):
    own, message = REFUSED_CALLBACKS.get(name, (CALLBACKS.get(name, {}), "callbacks.own"))
    try:
        built = build_callback("own", {"_target_": f"lightning.pytorch.callbacks.{name}", **own})
    except UserError as error:
        built, line = None, str(error)
    if built is None:  # some others want an argument, or a library that is not there
        assert name not in CALLBACKS
        assert message in line
    else:
        assert name not in REFUSED_CALLBACKS
        assert isinstance(built, getattr(callbacks, name))


def test_the_callbacks_of_lightning_that_fit_do_so_together(tmp_path, settings):
    own = settings["train"]
    extra = {name: {"_target_": f"lightning.pytorch.callbacks.{name}", **told} for name, told in CALLBACKS.items()}
    assert outcome(tmp_path, own, callbacks=own["callbacks"] | extra) is None


@pytest.mark.parametrize("kind", [Optimizer, lr_scheduler.LRScheduler, L.Callback])
def test_the_base_of_a_kind_is_none_of_the_kind(kind):
    with pytest.raises(UserError, match=f"not a {kind.__name__}"):
        resolve(f"{kind.__module__}.{kind.__name__}", kind)


@pytest.mark.parametrize("name", TINY)
def test_overfitting_shows_the_same_batches_each_epoch_and_their_loss_falls(tmp_path, monkeypatch, settings, name):
    seen, losses, batch_end = [], [], TrainingLoss.on_train_batch_end

    def watch(self, trainer, module, outputs, batch, batch_idx):
        seen.append(batch[0])
        losses.append(float(outputs["loss"]))
        batch_end(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(TrainingLoss, "on_train_batch_end", watch)
    own = settings[name]
    flags = own["trainer"] | {"overfit_batches": 2, "max_epochs": 12}
    assert outcome(tmp_path, own, name, trainer=flags) is None
    assert len(seen) == 24
    assert all(torch.equal(batch, seen[n % 2]) for n, batch in enumerate(seen))
    assert not torch.equal(seen[0], seen[1])
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert json.loads((tmp_path / "result.json").read_text())["val/images"] == 16


OTHER_VERSION = """
import sys
import lightning
from pixelcnn_lit.runs.command import run
lightning.__version__ = "9.9.1"
sys.argv = ["train", "trainer.max_steps=1", "run_dir=run"]
run("train")
"""


def test_a_version_of_lightning_that_was_not_tried_is_refused_in_one_line(tmp_path, children):
    """Its loops may count otherwise, and a resumed run then end otherwise, in silence."""
    asked = children.popen(tmp_path, "-c", OTHER_VERSION)
    assert asked.wait(60) == 1
    assert (
        asked.output().strip().startswith("error: lightning 9.9.1: resuming to the bit was tried with 2.6 alone; type")
    )
    assert len(asked.output().strip().splitlines()) == 1
