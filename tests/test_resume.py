"""Law 7: a run that was interrupted and resumed ends bit for bit like one that never was."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import command, killed, refused
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.atomic import second_name
from pixelcnn_lit.runs.places import CONF
from pixelcnn_lit.runs.run_dir import new_dir
from pixelcnn_lit.runs.saved import lock
from pixelcnn_lit.training.checkpoint_io import AtomicCheckpointIO
from pixelcnn_lit.training.resume import SeedEveryStep

DROPOUT = "model.dropout=0.2"
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
    DROPOUT,
    "label_dropout=0.1",
    "sampler.n_per_class=1",
    "callbacks.last.every_n_steps=2",
]
PLATEAU = ["scheduler=plateau", "scheduler.patience=0", "+scheduler.threshold=1.0"]  # halves at every validation


def train(directory: Path, *overrides: str) -> None:
    command("train", f"run_dir={directory}", *overrides)


def cut_off(directory: Path, overrides: list[str], where: str, after: int) -> None:
    """A run that is killed after `after` calls of the DensityModule's method `where`."""
    with killed(DensityModule, where, after):
        train(directory, *overrides)


def final(directory: Path) -> dict:
    """All of the last checkpoint that makes up a run, without paths and times."""
    content = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    result = json.loads((directory / "result.json").read_text())
    figures = {key: result[key] for key in ("val/nll", "test/nll", "val/images", "steps")}
    figures["training loss"] = content["callbacks"]["TrainingLoss"]
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
    "plateau": [*PLATEAU, "callbacks=samples", "model=pixelcnn_published"],
    "workers": ["dataset.num_workers=2"],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "two validations an epoch": ["trainer.val_check_interval=2"],
    "the same on a plateau": ["trainer.val_check_interval=2", *PLATEAU],
    "a validation every other epoch": ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4"],
    "the same by steps": ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4", "trainer.max_steps=18"],
    "stopped by max_steps": ["trainer.max_steps=13"],
    "no scheduler": ["~scheduler"],
    "another likelihood": ["likelihood=logistic_mixture"],
    "validations by steps": ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=4"],
    "overfitted": ["trainer.overfit_batches=2"],
    "bf16-true": ["trainer.precision=bf16-true"],
    "64-true": ["trainer.precision=64-true"],
    "longer epochs": ["trainer.limit_train_batches=1.0", "dataset.batch_size=256", *PLATEAU],
}


def settings_of(variant: str) -> list[str]:
    own = VARIANTS[variant]
    return [*(one for one in RUN if one != DROPOUT or "model=pixelcnn_published" not in own), *own]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that are never cut off, made when first asked for."""
    made = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole")
            train(made[variant], *settings_of(variant))
        return made[variant]

    return run


@pytest.fixture
def finished(tmp_path, whole) -> Path:
    """A copy of the plain run."""
    return shutil.copytree(whole("plain"), tmp_path / "run")


@pytest.fixture(scope="module")
def cut_at_step_8(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cut")
    cut_off(directory, RUN, "training_step", 8)
    return directory


@pytest.fixture
def cut(tmp_path, cut_at_step_8) -> Path:
    """A copy of a run that was killed in its second epoch of three."""
    return shutil.copytree(cut_at_step_8, tmp_path / "run")


# Those of the default run.
MOMENTS = [
    ("plain", "training_step", 5),
    ("plain", "validation_step", 5),
    ("plateau", "validation_step", 2),
    ("workers", "training_step", 8),
    ("accumulated", "training_step", 8),
    ("two validations an epoch", "validation_step", 6),
    ("a validation every other epoch", "training_step", 10),
    ("stopped by max_steps", "training_step", 11),
    ("overfitted", "training_step", 3),
]
OTHER_MOMENTS = [
    ("no scheduler", "training_step", 8),
    ("another likelihood", "training_step", 8),
    ("longer epochs", "training_step", 6),
    ("validations by steps", "training_step", 6),
    ("64-true", "validation_step", 2),
    ("plain", "training_step", 3),
    ("plain", "training_step", 6),
    ("plain", "training_step", 14),
    ("plain", "validation_step", 1),
    ("plateau", "training_step", 7),
    ("workers", "training_step", 10),
    ("accumulated", "validation_step", 2),
    ("two validations an epoch", "training_step", 4),
    ("two validations an epoch", "training_step", 7),
    ("two validations an epoch", "validation_step", 1),
    ("the same on a plateau", "training_step", 5),
    ("the same on a plateau", "validation_step", 3),
    ("a validation every other epoch", "training_step", 5),
    ("a validation every other epoch", "training_step", 16),
    ("the same by steps", "training_step", 5),
    ("stopped by max_steps", "validation_step", 5),
    ("validations by steps", "validation_step", 7),
    ("bf16-true", "training_step", 8),
]


@pytest.mark.parametrize(
    ("variant", "where", "after"),
    [*MOMENTS, *(pytest.param(*moment, marks=pytest.mark.long) for moment in OTHER_MOMENTS)],
)
def test_law_7_a_run_killed_anywhere_ends_like_one_never_killed(tmp_path, whole, variant, where, after):
    settings = settings_of(variant)
    expected = whole(variant)
    cut_off(tmp_path / "run", settings, where, after)
    train(tmp_path / "run", "ckpt=last")
    assert_same(final(tmp_path / "run"), final(expected))
    assert curves(tmp_path / "run") == curves(expected)
    steps = [event.step for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/nll_step")]
    assert len(set(steps)) == len(steps)  # what was written after the last checkpoint is forgotten


def test_a_run_directory_that_was_moved_goes_on(tmp_path, monkeypatch):
    """Its best score, too, which Lightning alone would forget: here what follows is worse."""
    cut_off(tmp_path / "here", RUN, "training_step", 13)
    (tmp_path / "here").rename(tmp_path / "there")
    nats = Density.forward
    monkeypatch.setattr(Density, "forward", lambda self, *batch: nats(self, *batch) * (1 if self.training else 2))
    train(tmp_path / "there", "ckpt=last")
    result = json.loads((tmp_path / "there" / "result.json").read_text())
    best = read_checkpoint(result["checkpoint"])
    assert result["checkpoint"].startswith(f"{tmp_path}/there")
    assert best["global_step"] == 10
    assert result["val/nll"] < math.log(17) + 0.1


def test_a_run_goes_on_from_the_path_of_its_checkpoint_alone(tmp_path, whole, monkeypatch):
    """From the best one, too, though it was written at another moment of the epoch."""
    monkeypatch.chdir(tmp_path)
    for name, after in (("last", 13), ("best", 12)):
        cut_off(tmp_path / name, RUN, "training_step", after)
        command("train", f"ckpt={name}/checkpoints/{name}.ckpt")
        assert_same(final(tmp_path / name), final(whole("plain")))


def test_another_choice_changes_what_differs_from_the_first_and_no_more(cut):
    train(cut, "ckpt=last", "trainer=auto", "trainer.accelerator=cpu", "callbacks=samples", "callbacks=default")
    settings = OmegaConf.load(cut / "config.yaml")
    assert settings.trainer.limit_train_batches == 5
    assert settings.trainer.accelerator == "cpu"
    assert json.loads((cut / "result.json").read_text())["steps"] == 15


def test_a_shorter_run_than_before_reports_the_score_of_the_weights_it_kept(finished):
    first = json.loads((finished / "result.json").read_text())
    train(finished, "ckpt=last", "trainer.max_epochs=2")
    again = json.loads((finished / "result.json").read_text())
    assert [first[key] for key in ("val/nll", "test/nll")] == [again[key] for key in ("val/nll", "test/nll")]


MISTAKES = [
    *("trainer.limit_train_batches=0.0001", "trainer.val_check_interval=100", "trainer.limit_test_batches=0"),
    *("~trainer", "~callbacks", "callbacks.ema=null", "trainer.precision=bf17", "callbacks=samples"),
]


def test_a_mistake_when_going_on_costs_a_finished_run_nothing(finished):
    kept = [finished / "result.json", finished / "config.yaml", *(finished / "checkpoints").iterdir()]
    before = [path.read_bytes() for path in kept]
    for mistake in MISTAKES:
        refused("train", f"run_dir={finished}", "ckpt=last", "trainer.max_epochs=4", mistake)
        assert [path.read_bytes() for path in kept] == before, mistake
    train(finished, "ckpt=last", "trainer.max_epochs=4")


def test_two_processes_do_not_share_a_run_directory(cut):
    with lock(cut):
        assert "another process trains there" in refused("train", f"run_dir={cut}", "ckpt=last")
    train(cut, "ckpt=last")


def test_a_finished_job_is_left_alone_only_if_it_is_the_one_that_is_typed(finished, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    train(finished, *RUN, "skip_completed=true")
    assert "completed before, left alone" in capsys.readouterr().out
    other = [*RUN, "model.n_residual=3", "skip_completed=true"]
    said = refused("train", f"run_dir={finished}", *other)
    assert "completed with" in said
    assert "ckpt=last to extend it" in said
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_a_finished_run_that_is_not_extended_says_that_nothing_was_left_to_train(finished, capsys):
    before = json.loads((finished / "result.json").read_text())
    for fewer in ([], ["trainer.max_steps=2"]):
        train(finished, "ckpt=last", *fewer)
        assert "nothing was left to train (trainer.max_epochs=" in capsys.readouterr().out
        after = json.loads((finished / "result.json").read_text())
        assert after["steps"] == before["steps"]
        assert after["test/bpd"] == before["test/bpd"]


def test_a_run_whose_yaml_is_in_a_folder_of_ones_own_asks_for_that_folder(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    shutil.copy(CONF / "model" / "pixelcnn.yaml", tmp_path / "mine" / "model" / "own.yaml")
    folder, run = f"--config-dir={tmp_path}/mine", [f"run_dir={tmp_path}/run"]
    command("train", folder, *run, *RUN, "model=own", "trainer.max_epochs=1")
    more = [*run, "ckpt=last", "trainer.max_epochs=2"]
    line = refused("train", *more)
    assert line.endswith("the run began with model/own, which is not in conf/; type its --config-dir, too")
    command("train", folder, *more)


def test_a_limit_that_is_long_past_leaves_nothing_to_train(finished, capsys):
    train(finished, "ckpt=last", "trainer.max_epochs=5")
    steps = json.loads((finished / "result.json").read_text())["steps"]
    train(finished, "ckpt=last", "trainer.max_epochs=1")
    assert "nothing was left to train (trainer.max_epochs=1, " in capsys.readouterr().out
    assert json.loads((finished / "result.json").read_text())["steps"] == steps


def test_other_commands_write_into_no_training_run(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for name in ("sample", "evaluate"):
        said = refused(name, f"ckpt={finished}", f"run_dir={finished}")
        assert said.endswith("holds a training run; type another directory, or leave it out")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_links_on_the_way_to_a_checkpoint_are_followed(tmp_path, cut):
    (cut / "checkpoints").rename(tmp_path / "elsewhere")
    (cut / "checkpoints").symlink_to(tmp_path / "elsewhere")
    train(cut, "ckpt=last")
    assert (cut / "result.json").is_file()


def test_an_untrusted_checkpoint_removes_nothing_outside(tmp_path, cut):
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    last = cut / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    for state in content["callbacks"].values():
        if "best_model_path" in state:
            path = f"{state['dirpath']}/../../victim"
            state |= {"kth_best_model_path": path, "best_model_path": path, "kth_value": torch.tensor(9.0)}
            state["best_k_models"] = {path: torch.tensor(9.0)}
    torch.save(content, last)
    train(cut, "ckpt=last")
    assert (victim / "sub").is_dir()


@pytest.mark.parametrize(
    "damage",
    [
        *({"loops": 3}, {"callbacks": []}, {"scored": 0}, {"hyper_parameters": 3}),
        *(
            pytest.param(damage, marks=pytest.mark.long)
            for damage in ({"loops": {}}, {"optimizer_states": []}, {"state_dict": {}}, {"averaging_state": 3})
        ),
        pytest.param({"lr_schedulers": 3}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_crafted_state_gets_one_line(cut, damage):
    last = cut / "checkpoints" / "last.ckpt"
    torch.save(torch.load(last, weights_only=True) | damage, last)
    refused("train", f"run_dir={cut}", "ckpt=last")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_law_7_on_a_gpu_that_is_asked_to_be_deterministic(tmp_path):
    settings = [word for word in RUN if not word.startswith("trainer=")]
    settings += ["trainer=gpu", "+trainer.deterministic=true"]
    train(tmp_path / "whole", *settings)
    cut_off(tmp_path / "cut", settings, "training_step", 8)
    train(tmp_path / "cut", "ckpt=last")
    assert_same(final(tmp_path / "cut"), final(tmp_path / "whole"))


@pytest.mark.parametrize("seed", range(3))
def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, whole, monkeypatch, capsys, seed):
    """As on a disk without atomic rename, or with delayed writes: a part of the file arrives."""
    save, rng, run = AtomicCheckpointIO.save_checkpoint, random.Random(seed), tmp_path / "run"

    def save_and_tear(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path)
        if Path(path).name == "last.ckpt" and checkpoint["global_step"] >= 10:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: rng.randrange(len(content))])

    with monkeypatch.context() as delayed:
        delayed.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_tear)
        cut_off(run, RUN, "training_step", 11)
    cut_off(run, ["ckpt=last"], "training_step", 1)  # before anything is saved again
    assert "; resumes from " in capsys.readouterr().out
    train(run, "ckpt=last")
    assert "; resumes from " not in capsys.readouterr().out
    assert_same(final(run), final(whole("plain")))
    assert (run / "checkpoints" / "damaged.ckpt").is_file()
    for number in range(2):
        (run / "checkpoints" / ("last-1.ckpt" if number else "last.ckpt")).write_bytes(b"torn")
    assert "last.ckpt: damaged" in refused("train", f"run_dir={run}", "ckpt=last")


@pytest.mark.parametrize("kills", [1, 3])
def test_while_a_checkpoint_is_written_there_are_two_others(tmp_path, monkeypatch, kills):
    """However often it is killed then."""
    run, save, saved = tmp_path / "run", AtomicCheckpointIO.save_checkpoint, []

    def save_or_die(self, checkpoint, path, storage_options=None):
        if Path(path).name == "last.ckpt":
            saved.append(1)
            if len(saved) == 4:
                raise KeyboardInterrupt
        save(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_or_die)
    for kill in range(kills):
        with suppress(BaseException):
            train(run, *(["ckpt=last"] if kill else RUN))
        saved[:] = [1, 1, 1]  # the next dies in its first
    whole = [torch.load(path, weights_only=True)["global_step"] for path in (run / "checkpoints").glob("last*.ckpt")]
    assert len(set(whole)) == 2


@pytest.mark.parametrize("broken", ["link", "link that was made", "replace"])
def test_a_file_gets_a_second_name_where_a_file_system_has_no_links(tmp_path, monkeypatch, broken):
    """Or where a network's loses the answer: never is the file itself written to."""
    file, name, link = tmp_path / "last.ckpt", tmp_path / "last-1.ckpt", os.link

    def refuse(*arguments):
        if broken == "link that was made":
            link(*arguments)
        monkeypatch.undo()  # the copy is renamed, too
        raise OSError

    for old in (None, b"old"):
        file.write_bytes(b"new")
        if old:
            name.unlink()
            name.write_bytes(old)
        monkeypatch.setattr(os, broken.partition(" ")[0], refuse)
        second_name(file, name)
        assert (file.read_bytes(), name.read_bytes()) == (b"new", b"new")
        assert sorted(tmp_path.iterdir()) == [name, file]


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_torn_one(cut, monkeypatch):
    last = cut / "checkpoints" / "last.ckpt"
    content = last.read_bytes()

    class Unreadable:
        def __init__(self, path):
            raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(zipfile, "ZipFile", Unreadable)
        assert "last.ckpt: Permission denied" in refused("train", f"run_dir={cut}", "ckpt=last")
    assert last.read_bytes() == content


def test_the_number_of_best_checkpoints_stays_that_of_the_run(cut):
    said = refused("train", f"run_dir={cut}", "ckpt=last", "callbacks.best.save_top_k=3")
    assert said.endswith("callbacks.best.save_top_k is 1 in the run and 3 here; it cannot be changed later")


def test_a_history_of_checkpoints_is_kept_and_resumed(tmp_path):
    settings = [*RUN, "callbacks.best.save_top_k=2", "callbacks.last.keep=3", "dataset.num_workers=0"]
    train(tmp_path / "whole", *settings)
    cut_off(tmp_path / "cut", settings, "training_step", 12)
    train(tmp_path / "cut", "ckpt=last")
    assert_same(final(tmp_path / "cut"), final(tmp_path / "whole"))
    for run in (tmp_path / "cut", tmp_path / "whole"):
        folder, result = run / "checkpoints", json.loads((run / "result.json").read_text())
        scores = {point["step"]: point["val/bpd"] for point in result["history"]}
        two = sorted(scores, key=scores.__getitem__)[:2]
        names = {"best.ckpt", "last.ckpt", "last-1.ckpt", "last-2.ckpt", *(f"best-{step}.ckpt" for step in two)}
        assert {path.name for path in folder.iterdir()} == names
        assert (folder / "best.ckpt").samefile(folder / f"best-{two[0]}.ckpt")
        steps = [read_checkpoint(str(folder / f"last{n}.ckpt"))["global_step"] for n in ("", "-1", "-2")]
        assert steps == sorted(steps, reverse=True)
        command("evaluate", f"ckpt={run}", "split=validation", "trainer=cpu", f"run_dir={tmp_path}/score")
        assert json.loads((tmp_path / "score" / "evaluation.json").read_text())["images"] == 250


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_signal_in_a_validation_never_loses_what_was_not_saved(tmp_path, whole, monkeypatch, accumulate):
    """Where gradients are being accumulated the state cannot be saved: the run continues to the next optimizer step."""
    settings = [*RUN, "trainer.val_check_interval=2", f"trainer.accumulate_grad_batches={accumulate}"]
    train(tmp_path / "whole", *settings)
    step, calls = DensityModule.validation_step, []

    def signalled(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DensityModule, "validation_step", signalled)
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "cut", *settings)
    assert stop.value.code == 130
    train(tmp_path / "cut", "ckpt=last")
    assert_same(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_what_is_typed_of_trainer_and_callbacks_changes_and_stays_changed(cut):
    cut_off(cut, ["ckpt=last", "trainer.max_epochs=4", "~callbacks.samples"], "training_step", 1)
    train(cut, "ckpt=last")
    assert json.loads((cut / "result.json").read_text())["steps"] == 20
    assert not (cut / "samples.png").exists()


def test_the_overrides_of_a_run_are_those_it_began_with(cut):
    train(cut, "ckpt=last")
    assert json.loads((cut / "result.json").read_text())["overrides"] == RUN


def test_chance_within_a_step_does_not_depend_on_what_was_drawn_before(tmp_path, whole):
    """Validation that draws numbers, other people's callbacks: training does not notice."""
    validation_step = DensityModule.validation_step

    def drawing(self, *arguments):
        torch.rand(7), np.random.rand(3), random.random()  # noqa: NPY002
        return validation_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DensityModule, "validation_step", drawing)
        train(tmp_path, *RUN)
    assert_same(final(tmp_path), final(whole("plain")))


def test_each_step_and_process_draws_its_own_numbers():
    drawn = set()
    for seed, epoch, batch, rank in itertools.product((0, 1), repeat=4):
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        for _ in range(2):
            SeedEveryStep(seed).on_train_batch_start(trainer, None, None, batch)
            drawn.add((float(torch.rand(1)), np.random.rand(), random.random()))  # noqa: NPY002
    assert len(drawn) == 16


@pytest.mark.parametrize("where", ["loss", "weight", "validation"])
def test_a_run_that_leaves_the_numbers_stops_and_keeps_what_was_good(tmp_path, cut, monkeypatch, where):
    training_step, nats = DensityModule.training_step, Density.forward

    def broken_training(self, batch, index):
        loss = training_step(self, batch, index)
        if self.global_step == 7 and where == "weight":  # a finite loss whose gradient is not
            bias = self.density.network.first.bias[0]
            loss = loss + (bias - bias.detach()).abs().sqrt()
        return loss * math.nan if self.global_step == 7 and where == "loss" else loss

    def broken_nats(self, x, y):
        return nats(self, x, y) * (math.nan if where == "validation" and not self.training else 1)

    monkeypatch.setattr(DensityModule, "training_step", broken_training)
    directory, asked = tmp_path / "new", RUN
    if where == "validation":
        directory, asked = cut, ["ckpt=last"]
        monkeypatch.setattr(Density, "forward", broken_nats)
    line = refused("train", f"run_dir={directory}", *asked)
    name, epoch, step = {"loss": ("the loss", 2, 8), "weight": ("a weight", 2, 8)}.get(where, ("val/nll", 2, 10))
    assert f"{name} is not finite at epoch {epoch}, step {step}, learning rate " in line
    assert "the last good checkpoint is" in line
    for path in (directory / "checkpoints").glob("*.ckpt"):
        content = read_checkpoint(str(path))
        assert all(value.isfinite().all() for value in content["current_model_state"].values())


def test_runs_started_in_the_same_second_get_directories_of_their_own(tmp_path):
    for n in range(20):
        named = Path(new_dir(str(tmp_path)))
        assert len(list(tmp_path.iterdir())) == n  # the name alone: the command makes it
        named.mkdir()
        assert f"_{os.getpid()}" in named.name  # other processes have other numbers


def test_what_a_killed_run_left_unfinished_is_swept_away(cut):
    stale = cut / "checkpoints" / ".tmp-1-last.ckpt"
    stale.write_bytes(b"half")
    train(cut, "ckpt=last")
    assert not stale.exists()
