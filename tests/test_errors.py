"""A user's mistake gets one line that says what to type, exit code 1 or 2, and no traceback."""

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch

import pixelcnn_lit.evaluate
import pixelcnn_lit.sample
import pixelcnn_lit.train
from pixelcnn_lit.build import Range, fits, resolve
from pixelcnn_lit.errors import UserError

MAINS = {"train": pixelcnn_lit.train, "sample": pixelcnn_lit.sample, "evaluate": pixelcnn_lit.evaluate}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a main in this process: returns (exit code, what it printed on stderr)."""

    def run(name: str, *overrides: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *overrides])
        try:
            MAINS[name].main()
            code = 0
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else int(stop.code or 0)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A digits checkpoint of one step."""
    directory = tmp_path_factory.mktemp("run")
    argv, sys.argv = sys.argv, ["train", *TINY, f"run_dir={directory}"]
    try:
        pixelcnn_lit.train.main()
    finally:
        sys.argv = argv
    return str(directory / "checkpoints" / "best.ckpt")


TINY = [
    "model_size=tiny",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.limit_train_batches=1",
]
TINY += ["callbacks.samples.every_n_epochs=0", "sampler.n_per_class=1"]

TYPOS = [
    ("dataset=foo", "there is no such dataset; choose from: cifar10, digits"),
    ("model.n_residul=3", "there is no such setting; did you mean n_residual?"),
    ("modle.n_residual=3", "there is no such setting; did you mean model?"),
    ("model.n_residual=-1", "model.n_residual=-1: must be a whole number >= 1"),
    ("model.n_residual=abc", "model.n_residual=abc: must be a whole number >= 1"),
    ("model.n_residual=2.5", "model.n_residual=2.5: must be a whole number >= 1"),
    ("model.n_residual=", "model.n_residual"),
    ("model.norm=bach", "model.norm=bach: must be one of layer, batch"),
    ("model.conditional=1", "model.conditional=1: must be true or false"),
    ("+model.depth=3", "model.depth: there is no such setting"),
    ("optimizer.lr=fast", "optimizer.lr=fast: must be a number"),
    ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
    ("likelihood.colour=grey", "likelihood.colour=grey: must be one of autoregressive, independent"),
    ("sampler.temperature=0", "sampler.temperature=0: must be a number >= 0.001"),
    ("sampler.n_per_class=0", "sampler.n_per_class=0"),
    ("dataset.batch_size=0", "dataset.batch_size=0: must be a whole number >= 1"),
    ("dataset.batch_size=5000", "more than the 1297 training images"),
    ("dataset.levels=300", "dataset.levels=300: must be a whole number >= 2 and <= 256"),
    ("dataset.levels=18", "digits has 17"),
    ("trainer.max_epochs=many", "trainer.max_epochs=many: must be a whole number"),
    ("trainer.precision=12", "trainer.precision=12"),
    ("trainer.accelerator=abacus", "trainer=auto fits any machine"),
    ("seed=-1", "seed=-1: must be a whole number >= 0"),
    ("label_dropout=2", "label_dropout=2: must be a number >= 0 and <= 1"),
    ("compile=maybe", "compile=maybe: must be true or false"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2"),
    ("callbacks.samples.every_n_epochs=abc", "callbacks.samples.every_n_epochs=abc: must be a whole number"),
    ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0: the best weights are chosen on validation"),
    ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=1: type at least trainer.check_val_every_n_epoch=2"),
    ("trainer.max_epochs=-1", "type trainer.max_epochs or trainer.max_steps"),
    ("ckpt=3", "ckpt=3: must be a text or null"),
    ("ckpt=missing.ckpt", "ckpt=missing.ckpt: no such file"),
    ("n_residual", "n_residual: not an override; type key=value"),
    ("scheduler=null", "a choice cannot be null; leave it out with ~NAME"),
    ("dataset=npz", "dataset.path is missing; type dataset.path=..."),
    ("dataset=npz dataset.path=absent.npz", "dataset.path=absent.npz: no such file"),
    ("dataset.download=true", "there is no such setting"),
]


@pytest.mark.parametrize(("overrides", "message"), TYPOS, ids=[overrides for overrides, _ in TYPOS])
def test_a_typo_gets_one_line(run, overrides, message):
    code, err = run("train", *TINY, *overrides.split())
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("way", ["debug=true", "HYDRA_FULL_ERROR"])
def test_the_traceback_is_there_for_those_who_ask(run, monkeypatch, way):
    if way == "HYDRA_FULL_ERROR":
        monkeypatch.setenv(way, "1")
    with pytest.raises(UserError):
        run("train", *TINY, "model.n_residual=-1", *(["debug=true"] if way == "debug=true" else []))


def damage(path: str, out: str, how: str) -> str:
    content = bytearray(Path(path).read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 255
    Path(out).write_bytes(content)
    return out


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
@pytest.mark.parametrize("main", ["train", "sample", "evaluate"])
def test_a_damaged_checkpoint_gets_one_line(run, checkpoint, tmp_path, main, how):
    code, err = run(main, f"ckpt={damage(checkpoint, str(tmp_path / 'x.ckpt'), how)}")
    assert code == 1
    assert "damaged" in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_checkpoint_of_another_dataset_is_refused_with_both_values(run, checkpoint, tmp_path):
    images, labels = np.zeros((60, 4, 4), np.uint8), np.arange(60) % 10
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    other = ["dataset=npz", f"dataset.path={tmp_path}/x.npz", "dataset.batch_size=8", "dataset.num_workers=0"]
    for main in ("train", "evaluate"):
        code, err = run(main, f"ckpt={checkpoint}", *other)
        assert code == 1
        assert "its image_shape is [1, 8, 8], here it is [1, 4, 4]" in err


def test_a_command_without_its_checkpoint_says_what_to_type(run):
    assert run("sample") == (1, "error: ckpt is missing; type ckpt=...\n")


def test_a_class_the_model_does_not_know_is_refused(run, checkpoint):
    for classes in ("[3,11]", "[10]", "[]"):  # 10 would be "no class", which this model never saw
        code, err = run("sample", f"ckpt={checkpoint}", f"classes={classes}")
        assert code == 1
        assert "this model was trained on 0, 1, 2" in err
    assert "classes=3: must be a list" in run("sample", f"ckpt={checkpoint}", "classes=3")[1]
    code, err = run("evaluate", f"ckpt={checkpoint}", "split=tset")
    assert code == 1
    assert "split=tset: must be one of train, validation, test" in err


def test_a_checkpoint_of_another_model_or_without_its_average_is_refused(run, checkpoint):
    code, err = run("train", *TINY, f"ckpt={checkpoint}", "model.n_residual=3")
    assert code == 1
    assert "its model is" in err
    code, err = run("train", *TINY, f"ckpt={checkpoint}", "callbacks=no_ema", "~callbacks.samples")
    assert code == 1
    assert "type that" in err
    assert "callbacks=default" in err


@pytest.mark.parametrize("content", [{"lr": 1}, torch.zeros(3), [], {"hyper_parameters": {"lr": 1}, "state_dict": {}}])
def test_a_checkpoint_of_another_program_gets_one_line(run, tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "not a checkpoint of this program" in err


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.optim.adam.torch.os.system",
        "pixelcnn_lit.command.os.system",
        "pixelcnn_lit.lit.load",
        "pixelcnn_lit.models.pixelcnn.nn.Linear",
        "pixelcnn_lit.models.absent.Net",
    ],
)
def test_a_target_is_a_class_of_ours_or_nothing(target):
    with pytest.raises(UserError, match="not a Module"):
        resolve(target, torch.nn.Module)


def test_a_checkpoint_that_names_a_foreign_target_runs_nothing(run, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"]["_target_"] = "torch.optim.adam.torch.os.system"
    torch.save(content, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "_target_=torch.optim.adam.torch.os.system: not a Module" in err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went_off",)


def test_a_checkpoint_with_code_in_it_runs_nothing(run, tmp_path):
    torch.save({"hyper_parameters": Bomb()}, tmp_path / "x.ckpt")
    code, err = run("sample", f"ckpt={tmp_path}/x.ckpt")
    assert code == 1
    assert "not a checkpoint of plain values" in err
    assert not (tmp_path / "went_off").exists()


def test_types_fit_as_people_write_them():
    assert fits(1, float)
    assert not fits(True, int)
    assert not fits(1.5, int)
    assert fits(None, int | None)
    assert fits([0.9, 0.99], tuple[float, float])
    assert not fits(["a"], list[int])
    assert not fits(0, Annotated[int, Range(1)])
    assert fits(None, Annotated[int | None, Range(1)])
