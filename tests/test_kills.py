"""Real signals to real processes, real full disks: nothing is lost and nothing is damaged.

Processes are forked from one that has everything imported, so that a run costs a second. $PIXELCNN_KILLS sets how
many runs are killed.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import command

from pixelcnn_lit.checkpoints import read_checkpoint

KILLS = int(os.environ.get("PIXELCNN_KILLS", "4"))
RUN = [
    "model_size=tiny",
    "model.hidden_channels=48",  # so that writing a checkpoint takes its time
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.limit_train_batches=8",
    "trainer.limit_val_batches=2",
    "trainer.max_epochs=4",
    "dataset.num_workers=0",
    "dataset.batch_size=16",
    "callbacks.samples.every_n_epochs=0",
    "callbacks.last.every_n_steps=1",
    "sampler.n_per_class=1",
]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pixelcnn_lit.train"])


def _train(directory: Path, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    directory.mkdir(exist_ok=True)
    output = os.open(directory / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    command("train", f"run_dir={directory}", *overrides)


def start(directory: Path, *overrides: str, **environment: str):
    process = processes.Process(target=_train, args=(directory, list(overrides), environment))
    process.start()
    return process


def finish(directory: Path, *overrides: str, **environment: str) -> int:
    process = start(directory, *overrides, **environment)
    process.join(120)
    return process.exitcode


def wait_until(condition, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the run ended before its moment came"
        assert time.monotonic() < end, "the moment never came"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    content = read_checkpoint(str(directory / "checkpoints" / "last.ckpt"))
    return {**content["state_dict"], **{f"raw.{k}": v for k, v in content["current_model_state"].items()}}


def assert_same_weights(a: Path, b: Path) -> None:
    for key, value in weights(a).items():
        assert torch.equal(value, weights(b)[key]), key
    one, other = (json.loads((directory / "result.json").read_text()) for directory in (a, b))
    assert (one["val/nll"], one["test/nll"]) == (other["val/nll"], other["test/nll"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert finish(directory, *RUN) == 0, (directory / "output.txt").read_text()
    return directory


def unfinished(directory: Path) -> list[Path]:
    return [*(directory / "checkpoints").glob(".tmp-*")]


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(KILLS))
def test_law_7_a_process_killed_at_a_random_moment_loses_nothing(tmp_path, whole, kill):
    """Every other time inside the writing of a checkpoint; every third with $TMPDIR on another filesystem."""
    rng, run = random.Random(kill), tmp_path / "run"
    elsewhere = {"TMPDIR": "/dev/shm"} if kill % 3 == 2 and Path("/dev/shm").is_dir() else {}
    last = run / "checkpoints" / "last.ckpt"
    process = start(run, *RUN, **elsewhere)
    wait_until(last.is_file, process)
    time.sleep(rng.uniform(0, 0.5))
    if kill % 2:
        wait_until(lambda: unfinished(run), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for path in {*(run / "checkpoints").iterdir()} - {*unfinished(run)}:
        read_checkpoint(str(path))  # whole: its checksums are verified
    assert finish(run, "ckpt=last", **elsewhere) == 0, (run / "output.txt").read_text()
    assert not unfinished(run)
    assert_same_weights(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, whole, signum, code):
    run = tmp_path / "run"
    process = start(run, *RUN, "callbacks.last.every_n_steps=null", "dataset.num_workers=2")
    wait_until((run / "checkpoints" / "best.ckpt").is_file, process)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == code, (run / "output.txt").read_text()
    lines = (run / "output.txt").read_text().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("stopped; to go on, type: python -m pixelcnn_lit.train run_dir=")
    assert finish(run, "ckpt=last") == 0
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_under_slurm_lightnings_requeue_works(tmp_path, whole):
    """At SIGUSR1 Lightning saves and asks Slurm to requeue the job, which is then typed the same again."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {f"SLURM_{key}": "0" for key in ("PROCID", "LOCALID", "NODEID")}
    slurm |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "localhost"}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    process = start(run, *RUN, **slurm)
    wait_until((run / "checkpoints" / "best.ckpt").is_file, process)
    os.kill(process.pid, signal.SIGUSR1)
    wait_until(asked.is_file, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert asked.read_text() == "requeue 77\n"
    assert list(run.glob("hpc_ckpt_*.ckpt"))
    assert finish(run, *RUN, **slurm, SLURM_RESTART_COUNT="1") == 0, (run / "output.txt").read_text()
    best = [json.loads((directory / "result.json").read_text())["test/nll"] for directory in (run, whole)]
    assert best[0] == pytest.approx(best[1], rel=0.02)  # Lightning saves wherever the signal strikes, not between steps


def test_a_signal_before_training_stops_without_a_traceback(tmp_path):
    code = "import os, signal, pixelcnn_lit.command, pixelcnn_lit.train as t\n"
    code += "t.image_data = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\npixelcnn_lit.command.run('train')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 143
    assert "Traceback" not in ended.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 6 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small filesystem")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_earlier_checkpoint_is_whole(small_disk, whole):
    run = small_disk / "run"
    process = start(run, *RUN)
    wait_until((run / "checkpoints" / "last.ckpt").is_file, process)
    filler = small_disk / "filler"
    size = sum(path.stat().st_size for path in (run / "checkpoints").iterdir())
    filler.write_bytes(bytes(max(0, 6 * 2**20 - size - 2**19)))
    process.join(60)
    output = (run / "output.txt").read_text()
    assert process.exitcode == 1, output
    assert "the disk is full" in output
    assert "bytes are needed" in output
    assert "Traceback" not in output
    assert not unfinished(run)
    filler.unlink()
    assert finish(run, "ckpt=last") == 0, (run / "output.txt").read_text()
    assert_same_weights(run, whole)
