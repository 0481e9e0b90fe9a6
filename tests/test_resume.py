"""Law 7: a run that was cut off and went on ends bit for bit like one that never was."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pixelcnn_lit.train
from pixelcnn_lit.lit import DensityModel

# 5 batches an epoch, 3 epochs, dropout, workers, an average of the weights: all that has a state.
RUN = [
    "model_size=tiny",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.limit_train_batches=5",
    "trainer.limit_val_batches=2",
    "trainer.max_epochs=3",
    "dataset.num_workers=0",
    "dataset.batch_size=16",
    "model.dropout=0.2",
    "label_dropout=0.1",
    "sampler.n_per_class=1",
    "callbacks.last.every_n_steps=2",
]
PLATEAU = ["scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=1.0"]  # halves at every validation


class Killed(Exception):
    """Nothing is saved when it strikes, as nothing is at a SIGKILL."""


def train(directory: Path, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", f"run_dir={directory}", *overrides])
        pixelcnn_lit.train.main()


def killed(directory: Path, overrides: list[str], where: str, after: int) -> None:
    """A run that is killed at its call number `after` of the DensityModel's method `where`."""
    original, calls = getattr(DensityModel, where), []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DensityModel, where, dying)
        with pytest.raises(Killed):
            train(directory, *overrides)


def final(directory: Path) -> dict:
    """All of the last checkpoint that makes up a run, without paths and times."""
    content = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "train_nats", "global_step")
    result = json.loads((directory / "result.json").read_text())
    figures = {key: result[key] for key in ("val/nll", "test/nll", "val/images", "steps")}
    return {key: content[key] for key in kept if key in content} | figures


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{n}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def curves(directory: Path) -> dict:
    """TensorBoard's scalars: (step, value) of each tag. What is repeated exactly counts once."""
    events = EventAccumulator(str(directory)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "hp_metric"]
    return {tag: sorted({(event.step, repr(event.value)) for event in events.Scalars(tag)}) for tag in tags}


VARIANTS = {
    "plain": [],
    "plateau": [*PLATEAU, "callbacks=no_ema", "model.norm=batch"],
    "workers": ["dataset.num_workers=2"],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "two validations an epoch": ["trainer.val_check_interval=2"],
    "a validation every other epoch": ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4"],
    "stopped by max_steps": ["trainer.max_steps=13"],
    "no scheduler": ["~scheduler"],
    "longer epochs": ["trainer.limit_train_batches=1.0", "dataset.batch_size=256", *PLATEAU],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that are never cut off, made when first asked for."""
    made = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole")
            train(made[variant], *RUN, *VARIANTS[variant])
        return made[variant]

    return run


@pytest.mark.parametrize(
    ("variant", "where", "after"),
    [
        ("plain", "training_step", 3),
        ("plain", "training_step", 5),
        ("plain", "training_step", 6),
        ("plain", "training_step", 14),
        ("plain", "validation_step", 1),
        ("plain", "validation_step", 5),
        ("plateau", "training_step", 7),
        ("plateau", "validation_step", 2),
        ("workers", "training_step", 8),
        ("workers", "training_step", 10),
        ("accumulated", "training_step", 8),
        ("accumulated", "validation_step", 2),
        ("two validations an epoch", "training_step", 4),
        ("two validations an epoch", "training_step", 7),
        ("two validations an epoch", "validation_step", 1),
        ("two validations an epoch", "validation_step", 6),
        ("a validation every other epoch", "training_step", 5),
        ("a validation every other epoch", "training_step", 10),
        ("a validation every other epoch", "training_step", 16),
        ("stopped by max_steps", "training_step", 11),
        ("stopped by max_steps", "validation_step", 5),
        ("no scheduler", "training_step", 8),
        ("longer epochs", "training_step", 6),
    ],
)
def test_law_7_a_run_killed_anywhere_ends_like_one_never_killed(tmp_path, whole, variant, where, after):
    settings = [*RUN, *VARIANTS[variant]]
    expected = whole(variant)
    killed(tmp_path / "run", settings, where, after)
    train(tmp_path / "run", "ckpt=last")
    assert_same(final(tmp_path / "run"), final(expected))
    assert curves(tmp_path / "run") == curves(expected)
