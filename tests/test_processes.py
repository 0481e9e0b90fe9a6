"""Several processes (DDP over gloo) give what one gives; sweeps over them, or in workers, give one tree."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Child, Children, save_npz, slurm

from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.runs.signals import Stopped, raise_on_signals
from pixelcnn_lit.training.resume import LastCheckpoint
from pixelcnn_lit.training.trainer import make_trainer

DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
RUN = [
    "model_size=tiny",
    "dataset=npz",
    "dataset.path=x.npz",
    "dataset.batch_size=4",
    "dataset.num_workers=0",
    "trainer.max_epochs=2",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "sampler.n_per_class=1",
]
BATCH_NORM = "model=pixelcnn_published"  # whose statistics each process counts for itself


def tasks(
    children: Children,
    directory: Path,
    name: str,
    *overrides: str,
    environment: Callable[[int], dict[str, str]] = lambda n: {},
) -> list[Child]:
    """A command as two processes, which some other program than Lightning starts, as torchrun or Slurm do."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1]), "NODE_RANK": "0"}
    own = [common | {"LOCAL_RANK": str(n)} | environment(n) for n in range(2)]
    return [children.start(directory, name, *overrides, **each) for each in own]


def run(directory: Path, name: str, *overrides: str) -> str:
    """What the command prints in `directory`, where it must end well; with trainer=ddp its first process."""
    with Children() as children:
        if "trainer=ddp" in overrides:
            first, second = tasks(children, directory, name, *overrides)
            assert second.wait(120) == 0
        else:
            first = children.start(directory, name, *overrides)
        assert first.wait(120) == 0
        return first.output()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an archive of odd numbers of images and a run of one process on it, with either norm."""
    directory = tmp_path_factory.mktemp("processes")
    save_npz(directory / "x.npz", (5, 5), 91, 9, classes=3)
    run(directory, "train", *RUN, BATCH_NORM, "trainer=cpu", "run_dir=batch_norm")
    run(directory, "train", *RUN, "trainer=cpu", "run_dir=layer_norm")
    return directory


def evaluate(directory: Path, ckpt: str, *trainer: str) -> dict:
    out = f"run_dir=scored/{len(list((directory / 'scored').glob('*')))}"
    printed = run(directory, "evaluate", f"ckpt={ckpt}", "split=validation", "trainer.precision=64-true", *trainer, out)
    return json.loads((directory / printed.splitlines()[-1]).read_text())


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_law_8_two_processes_score_like_one(place, norm):
    """5 images in 3 batches for the one, 4 in 2 for the other: nobody waits, nobody counts twice."""
    alone = evaluate(place, f"{norm}/checkpoints/last.ckpt", "trainer=cpu")
    both = evaluate(place, f"{norm}/checkpoints/last.ckpt", *DDP)
    assert alone["images"] == both["images"] == 9
    assert both["nll"] == pytest.approx(alone["nll"], abs=1e-9, rel=0)
    assert both["bpd_per_class"] == pytest.approx(alone["bpd_per_class"], abs=1e-9, rel=0)
    assert both["bpd_standard_error"] == pytest.approx(alone["bpd_standard_error"], abs=1e-9, rel=0)


@pytest.mark.parametrize(
    "without",
    ["trainer.check_val_every_n_epoch=2", pytest.param("dataset.validation_fraction=0", marks=pytest.mark.long)],
)
def test_no_process_waits_after_an_epoch_without_validation(place, without):
    """As where the first alone asks for a figure that is a mean over all: here there is no terminal, but lines."""
    directory = f"run_dir=unvalidated/{without.partition('=')[0]}"
    printed = run(place, "train", *RUN, *DDP, without, directory)
    assert printed.count("best checkpoint:") == 1
    assert "epoch 1/2, step" in printed


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_no_process_waits_in_a_validation_for_one_without_a_batch(strategy):
    """As a broadcast of buffers before each batch would."""
    trainer: Any = make_trainer({"accelerator": "cpu", "devices": 2, "strategy": strategy})
    assert trainer.strategy._ddp_kwargs["broadcast_buffers"] is False


def test_lightnings_own_handlers_of_signals_are_not_installed():
    trainer: Any = make_trainer({"accelerator": "cpu"})
    assert hasattr(type(trainer._signal_connector), "register_signal_handlers")  # the name that is replaced
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_while_processes_start_loses_none_of_them(monkeypatch):
    """One that is not written down would wait for this one half an hour."""
    trainer: Any = make_trainer({"accelerator": "cpu", "devices": 3, "strategy": "ddp"})
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def start(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        return "a process"

    monkeypatch.setattr(subprocess, "Popen", start)
    with raise_on_signals(), pytest.raises(Stopped):
        trainer.strategy.launcher._call_children_scripts()
    assert trainer.strategy.launcher.procs == ["a process", "a process"]


def test_a_stop_at_the_end_is_one_of_all_processes(monkeypatch):
    """Another one was asked, at a step at which they do not agree."""
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda answers, reduce_op: answers + torch.tensor([15, 0]))
    trainer: Any = SimpleNamespace(world_size=2, global_step=13, strategy=strategy, is_global_zero=True)
    last = LastCheckpoint()
    last._saved_at = time.monotonic()
    with pytest.raises(Stopped):
        last.on_train_end(trainer, None)


def assert_same_weights(a: Path, b: Path) -> None:
    saved = [read_checkpoint(str(directory / "checkpoints" / "last.ckpt")) for directory in (a, b)]
    assert saved[0]["global_step"] == saved[1]["global_step"]
    for key, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][key]), key


@pytest.mark.long
def test_two_processes_that_are_stopped_go_on_to_the_same_end(place, children):
    """Only one of them gets the signal. The statistics of BatchNorm are each process's own until they are scored."""
    settings = [*RUN, BATCH_NORM, *DDP, "trainer.max_epochs=3", "callbacks.last.every_n_steps=10"]
    whole = run(place, "train", *settings, "run_dir=whole")
    assert whole.count("best checkpoint:") == 1
    first, second = tasks(children, place, "train", *settings, "run_dir=cut")
    first.wait_until((place / "cut" / "checkpoints" / "best.ckpt").is_file)
    second.signal(signal.SIGTERM)
    assert first.wait(60) == 143
    assert second.wait(60) == 0
    assert "stopped" not in second.output()
    assert "Traceback" not in first.output()
    assert first.output().splitlines()[-1].startswith("stopped; to resume, type:")
    run(place, "train", *DDP, "run_dir=cut", "ckpt=last")
    assert_same_weights(place / "whole", place / "cut")


@pytest.mark.parametrize("before", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_run_resumes_in_another_number_of_processes(place, children, before):
    """The same images in the same order: without dropout, which each process draws for itself, it ends the same."""
    settings = [*RUN, "model.dropout=0", "trainer.precision=64-true", "trainer.max_epochs=12", "scheduler=plateau"]
    settings += ["callbacks.last.every_n_steps=5"]
    run(place, "train", *settings, "trainer=cpu", f"run_dir=alone_{before}")
    cut, processes = f"run_dir=cut_{before}", {1: ["trainer=cpu", "trainer.devices=1", "trainer.strategy=auto"], 2: DDP}
    start = (lambda *typed: [children.start(*typed)]) if before == 1 else (lambda *typed: tasks(children, *typed))
    begun = start(place, "train", *settings, *processes[before], cut)
    begun[0].wait_until((place / f"cut_{before}" / "checkpoints" / "best.ckpt").is_file)
    begun[0].signal(signal.SIGTERM)
    assert begun[0].wait(60) == 143
    printed = run(place, "train", *processes[3 - before], cut, "ckpt=last")
    assert "resumes at step" in printed
    results = [json.loads((place / name / "result.json").read_text()) for name in (f"alone_{before}", cut[8:])]
    assert results[0]["steps"] == results[1]["steps"]
    for figure in ("val/nll", "test/nll"):
        assert results[0][figure] == pytest.approx(results[1][figure], abs=1e-9, rel=0)
    saved = [
        read_checkpoint(f"{place}/{name}/checkpoints/last.ckpt")["state_dict"] for name in (f"alone_{before}", cut[8:])
    ]
    assert all(torch.allclose(weight, saved[1][name], atol=1e-9, rtol=0) for name, weight in saved[0].items())


@pytest.mark.parametrize("asked", [0, 1])
def test_one_of_two_tasks_gets_sigusr1_in_a_validation_and_the_first_requeues_the_job(place, children, tmp_path, asked):
    """Epochs are of two steps, and nearly all of the time is validation."""
    settings = [*RUN, BATCH_NORM, *DDP, "dataset.validation_fraction=0.9", "trainer.max_epochs=30", "callbacks=samples"]
    settings += ["callbacks.samples.every_n_epochs=0", f"dataset.path={place}/x.npz", "run_dir=run"]
    both = tasks(children, tmp_path, "train", *settings, environment=lambda n: slurm(tmp_path, 2, n))
    both[0].wait_until((tmp_path / "run" / "checkpoints" / "best.ckpt").is_file)
    both[asked].signal(signal.SIGUSR1)
    assert [task.wait(60) for task in both] == [138, 0]
    assert (tmp_path / "asked.txt").read_text() == "requeue 77\n"
    assert not any("Traceback" in task.output() for task in both)
    assert 0 < read_checkpoint(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))["global_step"] < 60


def machines(children: Children, directory: Path, *overrides: str) -> list[Child]:
    """A training as two agents of torchrun start it, each on a machine of its own, which here is the same."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{listening.getsockname()[1]}"
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", endpoint]
    typed = ["-m", "pixelcnn_lit.train", *DDP, "trainer.devices=1", "+trainer.num_nodes=2", *overrides]
    return [children.popen(directory, *torchrun, *typed) for _ in range(2)]


def started_by(pid: int) -> list[int]:
    """All processes that one has started, and that those have."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [each for child in children for each in started_by(child)]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks /proc for processes")
def test_of_two_machines_one_dies_and_the_other_ends_and_the_run_resumes(place, children):
    settings = [*RUN, "trainer.max_epochs=40", "callbacks.last.every_n_steps=5", "run_dir=machines"]
    both = machines(children, place, *settings)
    both[0].wait_until((place / "machines" / "checkpoints" / "best.ckpt").is_file, 120)
    for process in [both[1].pid, *started_by(both[1].pid)]:
        os.kill(process, signal.SIGKILL)
    assert both[0].wait_for_all(120) != 0
    assert "error: another process of the run has ended" in both[0].output()
    one = ["trainer=cpu", "trainer.devices=1", "trainer.strategy=auto", "++trainer.num_nodes=1", "trainer.max_epochs=5"]
    run(place, "train", *one, "run_dir=machines", "ckpt=last")
    assert (place / "machines" / "result.json").is_file()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="asks /proc for processes")
def test_a_signal_before_training_leaves_no_process_waiting(place, spawn):
    """The second process is on its way to the first, for which it would wait half an hour."""
    process = spawn(place, "train", *RUN, *DDP, "run_dir=early")
    process.wait_until(lambda: len(process.living()) > 1)
    process.signal(signal.SIGTERM)
    assert process.wait_for_all(60) in (143, -signal.SIGKILL)
    assert "Traceback" not in process.output()


@pytest.mark.long
def test_a_sweep_of_two_processes_a_job_is_one_tree(place, spawn):
    """Lightning starts the second process of each."""
    sweep = ["-m", *RUN, *DDP, "model=pixelcnn,pixelcnn_published", "trainer.max_epochs=1", "run_dir=sweep"]
    assert spawn(place, "train", *sweep).wait(180) == 0
    results = sorted(path.parent.name for path in (place / "sweep").rglob("result.json"))
    assert results == ["0", "1"]
    assert sorted(path.name for path in (place / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
    assert not (place / "runs").exists() or not list((place / "runs").glob("train/*"))


@pytest.mark.long
def test_a_sweep_in_workers_that_is_typed_again_does_what_is_left(place, spawn):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[sweeps]'")
    sweep = ["-m", *RUN, "trainer=cpu", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run_dir=workers"]
    failed = spawn(place, "train", *sweep, "model.n_residual=1,-1,2")
    assert failed.wait(180) == 1
    assert "Traceback" not in failed.output()
    left = {path.parent.name: path.stat().st_mtime_ns for path in (place / "workers").rglob("result.json")}
    assert sorted(left) == ["0", "2"]
    assert spawn(place, "train", *sweep, "model.n_residual=1,1,2", "skip_completed=true").wait(180) == 0
    again = {path.parent.name: path.stat().st_mtime_ns for path in (place / "workers").rglob("result.json")}
    assert sorted(again) == ["0", "1", "2"]
    assert (again["0"], again["2"]) == (left["0"], left["2"])
