"""How many threads and processes a command takes: a function of its settings, never of what else is running."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from helpers import command
from hydra import compose, initialize_config_dir
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from omegaconf import OmegaConf
from tiny import configs

from pixelcnn_lit.checkpoints.safetensors import write_weights
from pixelcnn_lit.codec import coder
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs import machine, workers
from pixelcnn_lit.runs.command import CONF
from pixelcnn_lit.samplers import draw as drawing
from pixelcnn_lit.training.trainer import make_trainer, settle_threads

FACTS = {
    "digits": {"image_shape": [1, 8, 8], "levels": 17},
    "mnist": {"image_shape": [1, 28, 28], "levels": 256},
    "npz": {"image_shape": [3, 32, 32], "levels": 256},
    "cifar10": {"image_shape": [3, 32, 32], "levels": 256},
}
TINY = [
    "model_size=tiny",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "sampler.n_per_class=1",
    "callbacks.samples.every_n_epochs=1",
]


@pytest.fixture(autouse=True)
def _none_but_said(monkeypatch):
    """Torch keeps its one thread: several would come to a standstill beside other programs, and other tests."""
    said = [1]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: said.__setitem__(0, n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: said[0])


@pytest.fixture
def four_cores(monkeypatch):
    """And nothing said of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 4)


def spied(monkeypatch, owner: Any, name: str) -> list[int]:
    """With how many threads a function is called."""
    original, seen = getattr(owner, name), []

    def spy(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.fixture
def ckpt(tmp_path) -> str:
    """A tiny model of images of 1×4×4, as a file."""
    facts = {"image_shape": [1, 4, 4], "levels": 17, "num_classes": 3, "class_names": ["a", "b", "c"], "label": ""}
    model = Density(**configs("pixelcnn", "categorical"), **facts, dataset={})
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model.settings)
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("typed", "environment", "work", "processes", "taken"),
    [
        (None, None, 0, 1, 1),
        (None, None, machine.LARGE, 1, 4),
        (None, None, machine.LARGE, 2, 2),
        (None, None, machine.LARGE, 8, 1),
        (None, "2", 0, 1, 2),
        (None, "1", machine.LARGE, 1, 1),
        (None, "3,1", 0, 1, 3),
        (None, "0", 0, 1, 1),
        (None, "many", machine.LARGE, 1, 4),
        (7, "2", machine.LARGE, 2, 7),
    ],
)
def test_what_is_typed_goes_before_the_environment_and_that_before_the_work(
    four_cores, monkeypatch, typed, environment, work, processes, taken
):
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert machine.take_threads(typed, work, processes) == torch.get_num_threads() == taken


def test_cores_are_those_that_this_process_may_use_where_the_system_tells(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert (machine.cores(), machine.processes_of(1), machine.processes_of(3)) == (2, 2, 1)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores() == 16


def work_of(*overrides: str, batch_size: int | None = None) -> float:
    """Of a training step under these overrides of `train`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(overrides))
    settings: Any = OmegaConf.to_container(cfg)
    dataset = settings["dataset"]["_target_"].rpartition(".")[2]
    kinds = {key: settings[key] for key in ("model", "likelihood")}
    facts = {**FACTS[dataset], "num_classes": 10, "class_names": []}
    with torch.device("meta"):
        model = Density(**kinds, **facts)
    return machine.step_work(model, model.image_shape, batch_size or settings["dataset"]["batch_size"])


RECIPES = list((CONF / "experiment").rglob("*.yaml"))


def test_recipes_for_a_laptop_step_on_one_thread_and_the_published_size_on_all():
    recipes = {path.relative_to(CONF / "experiment").with_suffix("").as_posix(): path for path in RECIPES}
    laptop = [name for name, path in recipes.items() if "trainer: cpu" in path.read_text()]
    race = [name for name in recipes if name.startswith("mnist/race/")]
    assert len({*laptop, *race}) > 6
    for name in {*laptop, *race}:
        assert work_of(f"experiment={name}") < machine.LARGE, name
    assert work_of() < machine.LARGE
    for dataset in ("cifar10", "mnist"):
        assert work_of(f"experiment={dataset}/baseline") >= machine.LARGE
    assert work_of("dataset=cifar10", "model_size=base", batch_size=8) >= machine.LARGE


NEEDED = {"ckpt": "mnist", "classifier_ckpt": __file__, "file": "x.plc", "out": "x.npz"}  # by those that have them


@pytest.mark.parametrize("name", [path.stem for path in CONF.glob("*.yaml") if "- job" in path.read_text()])
def test_every_command_takes_threads_and_checks_them_before_any_work(tmp_path, capsys, name):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    needed = [f"{key}={value}" for key, value in NEEDED.items() if OmegaConf.is_missing(config, key)]
    for wrong in ("0", "two"):
        with pytest.raises(SystemExit):
            command(name, f"run_dir={tmp_path}", f"threads={wrong}", *needed)
        expected = f"error: threads={wrong}: must be a whole number >= 1 and <= 1024 or null"
        assert (tmp_path / "error.txt").read_text().strip() == expected.removeprefix("error: ")


def test_a_run_keeps_its_threads_and_its_grids_step_on_one(four_cores, monkeypatch, tmp_path, capsys):
    training, grids = spied(monkeypatch, DensityModule, "training_step"), spied(monkeypatch, drawing, "walk")
    initial = spied(monkeypatch, torch.nn.init, "kaiming_uniform_")

    def train(*overrides: str) -> dict[str, set[int] | int]:
        for seen in (training, grids, initial):
            seen.clear()
        command("train", f"run_dir={tmp_path}", *overrides)
        taken: Any = OmegaConf.load(tmp_path / "config.yaml")
        return {"training": set(training), "grids": set(grids), "saved": taken.threads}

    monkeypatch.setattr(machine, "LARGE", 1)
    begun = train(*TINY, "trainer.max_epochs=1")
    assert begun == {"training": {4}, "grids": {1}, "saved": 4}
    assert initial[0] == 1  # the first weights do not depend on the cores
    assert capsys.readouterr().out.splitlines()[2] == "4 of 4 CPU threads (beside other programs threads=1 is faster)"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert train("ckpt=last", "trainer.max_epochs=2") == {"training": {4}, "grids": {2}, "saved": 4}
    assert train("ckpt=last", "trainer.max_epochs=3", "threads=1") == {"training": {1}, "grids": {2}, "saved": 1}
    assert (
        "1 of 8 CPU threads (threads=8 may be faster, but not beside other programs)"
        in capsys.readouterr().out.splitlines()
    )
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text().replace("threads: 1\n", ""))
    assert train("ckpt=last", "trainer.max_epochs=4")["training"] == {2}  # a run of an earlier release has none


def test_each_of_several_processes_takes_its_share_whatever_lightning_sets(four_cores, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "")  # and as it was when this test is over
    trainer: Any = make_trainer({"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    for work, share in ((machine.LARGE, 1), (2 * machine.LARGE, 2)):  # of a step of both
        assert settle_threads(trainer, None, work) == share
        del os.environ["OMP_NUM_THREADS"]
        _set_num_threads_if_needed(3)  # as Lightning's launcher does
        trainer.callbacks[-1].setup(trainer, None, "fit")
        assert torch.get_num_threads() == share
        os.environ["OMP_NUM_THREADS"] = ""
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_drawing_takes_one_thread_and_gives_the_others_back(four_cores, monkeypatch):
    seen = spied(monkeypatch, drawing, "walk")
    facts = {"image_shape": [1, 4, 4], "levels": 17, "num_classes": 3, "class_names": [], "label": "", "dataset": {}}
    model = Density(**configs("pixelcnn", "categorical"), **facts)
    torch.set_num_threads(3)
    model.draw({"_target_": "pixelcnn_lit.samplers.draw.draw"})
    model.draw({"_target_": "pixelcnn_lit.samplers.draw.draw"}, threads=2)
    assert seen == [1, 2]
    assert torch.get_num_threads() == 3


def test_sample_divides_its_cores_into_processes_unless_somebody_watches(
    four_cores, monkeypatch, tmp_path, capsys, ckpt
):
    asked, share = [], workers.share
    monkeypatch.setattr(drawing, "share", lambda *args: asked.append((args[4], args[2] is None)) or share(*args))
    for own, processes, alone in (([], 4, False), (["threads=2"], 2, False), (["gif=true"], 1, True)):
        command("sample", f"ckpt={ckpt}", f"run_dir={tmp_path}/out", "sampler.batch_size=2", *own)
        assert asked.pop() == (processes, alone)
        line = capsys.readouterr().out.splitlines()
        together = (
            f"in each of up to {processes} processes"
            if processes > 1
            else "(threads=4 may be faster, but not beside other programs)"
        )
        assert line[0] == f"{2 if processes == 2 else 1} of 4 CPU threads {together}"
        assert "6 images of a, b, c, " in line[1]
        assert " images/s: " in line[1]


def test_a_file_is_read_with_the_threads_it_was_written_with(four_cores, monkeypatch, tmp_path, capsys, ckpt):
    x = np.random.default_rng(0).integers(17, size=(3, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=x, labels=np.arange(3))
    seen, file = spied(monkeypatch, coder, "walk"), f"file={tmp_path}/x.plc"
    own = [f"ckpt={ckpt}", f"run_dir={tmp_path}/run", f"out={tmp_path}/y.npz"]
    command("compress", *own[:2], f"images={tmp_path}/x.npz", f"out={tmp_path}/x.plc", "threads=3")
    assert "3 of 4 CPU threads (threads=4 may be faster, but not beside other programs)" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command("decompress", *own, file)
    assert "3 of 4 CPU threads" in capsys.readouterr().out
    assert set(seen) == {3}
    assert (np.load(tmp_path / "y.npz")["images"][..., 0] == x).all()
    with pytest.raises(SystemExit, match=r"threads=1: .*x.plc was written with 3"):
        command("decompress", *own, file, "threads=1")
