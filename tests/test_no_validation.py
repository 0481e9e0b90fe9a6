"""dataset.validation_fraction=0: all training images are trained on, and the last weights are kept and tested."""

import json
from pathlib import Path

import pytest
import torch
from helpers import command, killed, refused, save_npz
from tiny import open_data

from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.training.sample_grid import SampleGrid

STOP = "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"


@pytest.fixture
def all_of_it(tmp_path) -> list[str]:
    save_npz(tmp_path / "x.npz", (5, 4), 40, 12, classes=3)
    data = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", "dataset.batch_size=8", "dataset.validation_fraction=0"]
    return [*data, "dataset.num_workers=0", "trainer.log_every_n_steps=1", "trainer.precision=32-true"]


SMALL = ["model_size=tiny", "sampler.n_per_class=1"]


@pytest.mark.parametrize(
    ("name", "own", "steps"),
    [
        ("train", [*SMALL, "trainer.max_steps=7", "callbacks=samples"], 7),
        pytest.param(
            "train", [*SMALL, "trainer.max_epochs=1", "trainer.val_check_interval=2"], 5, marks=pytest.mark.long
        ),
        ("train", [*SMALL, "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"], 15),
        ("train", [*SMALL, "trainer.max_epochs=2", "+callbacks.best.every_n_train_steps=3"], 10),
        ("train_classifier", ["classifier.width=4", "trainer.max_epochs=2"], 10),
    ],
)
def test_the_last_weights_are_kept_and_tested(tmp_path, all_of_it, capsys, name, own, steps):
    command(name, *all_of_it, *own, f"run_dir={tmp_path}/run")
    kept, last = (read_checkpoint(tmp_path / "run" / "checkpoints" / f"{which}.ckpt") for which in ("best", "last"))
    assert kept["global_step"] == last["global_step"] == steps
    assert all(torch.equal(value, last["state_dict"][key]) for key, value in kept["state_dict"].items())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test/images"] == 12
    assert not [key for key in result if key.startswith("val/")]
    assert "trained without validation" in result["label"]
    assert "trained without validation: the last weights, test" in capsys.readouterr().out


def test_all_images_are_trained_on(all_of_it):
    data = open_data(*(setting for setting in all_of_it if setting.startswith("dataset")))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 0, 12]
    assert sum(len(y) for _, y in data.train_dataloader()) == 40


@pytest.mark.long
def test_such_a_run_killed_and_resumed_ends_like_one_never_killed(tmp_path, all_of_it):
    own = [*SMALL, "trainer.max_epochs=2", "callbacks.last.every_n_steps=1"]
    command("train", *all_of_it, *own, f"run_dir={tmp_path}/whole")
    with killed(DensityModule, "training_step", 7):
        command("train", *all_of_it, *own, f"run_dir={tmp_path}/cut")
    command("train", f"run_dir={tmp_path}/cut", "ckpt=last")
    for name in ("best", "last"):
        whole, cut = (weights(tmp_path / run, name) for run in ("whole", "cut"))
        assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    whole, cut = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "cut"))
    assert (whole["label"], whole["test/nll"]) == (cut["label"], cut["test/nll"])


def weights(run: Path, name: str) -> dict:
    return read_checkpoint(run / "checkpoints" / f"{name}.ckpt")["state_dict"]


def test_sample_grids_come_after_epochs(tmp_path, all_of_it, monkeypatch):
    drawn = []
    monkeypatch.setattr(SampleGrid, "draw", lambda self, trainer, density: drawn.append(trainer.current_epoch))
    epochs = ["trainer.max_epochs=4", "callbacks.samples.every_n_epochs=2", "callbacks=samples"]
    monkeypatch.setattr("pixelcnn_lit.train.closing_lines", lambda *_: "")
    command("train", *all_of_it, *SMALL, *epochs, f"run_dir={tmp_path}/run")
    assert drawn[:-1] == [1, 3]  # and once more, at the end


def test_training_figures_stop_a_run_after_its_epochs(tmp_path, all_of_it):
    stop = [STOP, "+callbacks.stop.monitor=train/nll", "+callbacks.stop.min_delta=100", "+callbacks.stop.patience=1"]
    longer = ["trainer.max_epochs=6", "trainer.check_val_every_n_epoch=2"]
    command("train", *all_of_it, *SMALL, *stop, *longer, f"run_dir={tmp_path}/run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 2


def test_a_run_that_is_cut_short_is_scored_by_its_last_weights(tmp_path, all_of_it):
    with killed(DensityModule, "training_step", 8):
        own = [*SMALL, "trainer.max_epochs=9", "callbacks.last.every_n_steps=1"]
        command("train", *all_of_it, *own, f"run_dir={tmp_path}/run")
    command("train", f"run_dir={tmp_path}/run", "ckpt=last", "trainer.max_steps=6")
    kept = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert kept["global_step"] == json.loads((tmp_path / "run" / "result.json").read_text())["steps"] > 6


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["scheduler=plateau"], "scheduler: ReduceLROnPlateau follows validations"),
        ([STOP, "+callbacks.stop.monitor=val/nll"], "callbacks.stop.monitor=val/nll: dataset.validation_fraction=0"),
        (["scheduler._target_=null"], "not a LRScheduler"),
        (["callbacks.learning_rate=null"], "callbacks.learning_rate: must be settings with a _target_"),
    ],
)
def test_what_follows_validations_is_refused(tmp_path, all_of_it, own, message):
    assert message in refused("train", *all_of_it, *SMALL, *own, f"run_dir={tmp_path}/run")


def test_a_source_with_validation_images_of_its_own_refuses_and_an_empty_split_is_none_to_score(tmp_path, all_of_it):
    said = refused("train", "dataset=digits", "dataset.validation_fraction=0", f"run_dir={tmp_path}/a")
    assert "digits has validation images of its own" in said
    command("train", *all_of_it, *SMALL, "trainer.max_epochs=1", f"run_dir={tmp_path}/run")
    said = refused("evaluate", f"ckpt={tmp_path}/run", "split=validation", f"run_dir={tmp_path}/b")
    assert "trained without validation has no such images; type another split" in said
