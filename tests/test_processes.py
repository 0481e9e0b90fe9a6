"""Several processes (DDP over gloo) give what one gives; sweeps over them, or in workers, give one tree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pixelcnn_lit.checkpoints import read_checkpoint
from pixelcnn_lit.resume import LastCheckpoint, Stopped
from pixelcnn_lit.trainer import make_trainer

pytestmark = pytest.mark.slow
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
RUN = [
    "model_size=tiny",
    "model.norm=batch",
    "dataset=npz",
    "dataset.path=x.npz",
    "dataset.batch_size=4",
    "dataset.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "sampler.n_per_class=1",
]


def command(directory: Path, name: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", f"pixelcnn_lit.{name}", *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(directory: Path, name: str, *overrides: str) -> str:
    """What the command prints in `directory`, where it must end well."""
    asked = command(directory, name, *overrides)
    ended = subprocess.run(asked, cwd=directory, capture_output=True, text=True, env=environment(), timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an archive of odd numbers of images and, in `one`, a run of one process on it."""
    directory, rng = tmp_path_factory.mktemp("processes"), np.random.default_rng(0)
    x, y = rng.integers(256, size=(91, 5, 5), dtype=np.uint8), np.arange(91) % 3
    np.savez(directory / "x.npz", train_images=x, train_labels=y, test_images=x[:9], test_labels=y[:9])
    run(directory, "train", *RUN, "trainer=cpu", "run_dir=one")
    run(directory, "train", *RUN, "trainer=cpu", "run_dir=layer", "model.norm=layer")
    return directory


def evaluate(directory: Path, ckpt: str, *trainer: str) -> dict:
    out = f"run_dir=scored/{len(list((directory / 'scored').glob('*')))}"
    printed = run(directory, "evaluate", f"ckpt={ckpt}", "split=validation", "trainer.precision=64-true", *trainer, out)
    return json.loads((directory / printed.splitlines()[-1]).read_text())


@pytest.mark.parametrize("norm", ["one", "layer"])
def test_law_8_two_processes_score_like_one(place, norm):
    """5 images in 3 batches for the one, 4 in 2 for the other: nobody waits, nobody counts twice."""
    alone = evaluate(place, f"{norm}/checkpoints/last.ckpt", "trainer=cpu")
    both = evaluate(place, f"{norm}/checkpoints/last.ckpt", *DDP)
    assert alone["images"] == both["images"] == 9
    assert both["nll"] == pytest.approx(alone["nll"], abs=1e-9, rel=0)
    assert both["bpd_per_class"] == pytest.approx(alone["bpd_per_class"], abs=1e-9, rel=0)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_no_process_waits_in_a_validation_for_one_without_a_batch(strategy):
    """As a broadcast of buffers before each batch would."""
    trainer: Any = make_trainer({"accelerator": "cpu", "devices": 2, "strategy": strategy})
    assert trainer.strategy._ddp_kwargs["broadcast_buffers"] is False


def test_a_stop_at_the_end_is_one_of_all_processes():
    """Another one was asked, at a step at which they do not agree."""
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda answers, reduce_op: answers + torch.tensor([15, 0]))
    trainer: Any = SimpleNamespace(world_size=2, global_step=13, strategy=strategy)
    last = LastCheckpoint()
    last._asked, last._saved_at = 0, time.monotonic()
    with pytest.raises(Stopped):
        last.on_train_end(trainer, None)


def test_two_processes_that_are_stopped_go_on_to_the_same_end(place):
    """Only one of them gets the signal. The statistics of BatchNorm are each process's own until they are scored."""
    settings = [*RUN, *DDP, "trainer.max_epochs=5", "callbacks.last.every_n_steps=10"]
    whole = run(place, "train", *settings, "run_dir=whole")
    assert whole.count("best checkpoint:") == 1  # from the first process alone
    asked = command(place, "train", *settings, "run_dir=cut")
    process = subprocess.Popen(asked, cwd=place, stdout=subprocess.PIPE, text=True, env=environment())
    while not (place / "cut" / "checkpoints" / "best.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert printed.splitlines()[-1].startswith("stopped; to go on, type:")
    run(place, "train", "run_dir=cut", "ckpt=last")
    saved = [read_checkpoint(str(place / name / "checkpoints" / "last.ckpt")) for name in ("whole", "cut")]
    assert saved[0]["global_step"] == saved[1]["global_step"]
    for key, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][key]), key


def test_a_sweep_of_two_processes_a_job_is_one_tree(place):
    run(place, "train", "-m", *RUN, *DDP, "model.norm=layer,batch", "trainer.max_epochs=1", "run_dir=sweep")
    results = sorted(path.parent.name for path in (place / "sweep").rglob("result.json"))
    assert results == ["0", "1"]
    assert sorted(path.name for path in (place / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
    assert not (place / "runs").exists() or not list((place / "runs").glob("train/*"))


def test_a_sweep_in_workers_that_is_typed_again_does_what_is_left(place):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[sweeps]'")
    sweep = ["-m", *RUN, "trainer=cpu", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run_dir=workers"]
    asked = command(place, "train", *sweep, "model.n_residual=1,-1,2")
    failed = subprocess.run(asked, cwd=place, capture_output=True, text=True, env=environment(), check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    left = {path.parent.name: path.stat().st_mtime_ns for path in (place / "workers").rglob("result.json")}
    assert sorted(left) == ["0", "2"]
    run(place, "train", *sweep, "model.n_residual=1,1,2", "skip_completed=true")
    again = {path.parent.name: path.stat().st_mtime_ns for path in (place / "workers").rglob("result.json")}
    assert sorted(again) == ["0", "1", "2"]
    assert (again["0"], again["2"]) == (left["0"], left["2"])
