"""Real signals to real processes, real full disks: nothing is lost, nothing is damaged, nothing hangs.

$PIXELCNN_KILLS sets how many runs are killed, $PIXELCNN_SIGNALS how many are signalled.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import Child, Children, slurm

from pixelcnn_lit.checkpoints.read import read_checkpoint

KILLS = int(os.environ.get("PIXELCNN_KILLS", "3"))
SIGNALS = int(os.environ.get("PIXELCNN_SIGNALS", "4"))
RUN = [
    "model_size=tiny",
    "model.hidden_channels=48",  # so that writing a checkpoint takes its time
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.limit_train_batches=8",
    "trainer.limit_val_batches=2",
    "trainer.max_epochs=4",
    "trainer.log_every_n_steps=1",
    "dataset.num_workers=0",
    "dataset.batch_size=16",
    "callbacks.samples.every_n_epochs=2",
    "callbacks.last.every_n_steps=1",
    "sampler.n_per_class=1",
]
SIGNUMS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def last(directory: Path) -> Path:
    return directory / "checkpoints" / "last.ckpt"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    content = read_checkpoint(str(last(directory)))
    return {**content["state_dict"], **{f"raw.{k}": v for k, v in content["current_model_state"].items()}}


def assert_same_end(a: Path, b: Path) -> None:
    expected = weights(b)
    for key, value in weights(a).items():
        assert torch.equal(value, expected[key]), key
    one, other = (json.loads((directory / "result.json").read_text()) for directory in (a, b))
    assert (one["val/nll"], one["test/nll"]) == (other["val/nll"], other["test/nll"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupts, and the seconds it took in `seconds.txt`."""
    directory, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    with Children() as children:
        assert children.start(directory, "train", "run_dir=run", *RUN).wait(120) == 0
    (directory / "run" / "seconds.txt").write_text(str(time.monotonic() - began))
    return directory / "run"


@pytest.mark.skipif("PIXELCNN_MINUTES" not in os.environ, reason="set PIXELCNN_MINUTES, of training, as 20")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks /proc")
def test_neither_memory_nor_open_files_grow_with_the_steps(tmp_path, spawn):
    """An ordinary run, with validations, grids, checkpoints and curves, takes in its first third all that it takes."""
    minutes = float(os.environ["PIXELCNN_MINUTES"])
    settings = ["model_size=tiny", "trainer=cpu", "dataset.num_workers=1", "trainer.max_epochs=-1"]
    process = spawn(tmp_path, "train", *settings, "callbacks.samples.every_n_epochs=5", "run_dir=run")
    process.wait_until(last(tmp_path / "run").is_file)
    memory, files = [], []
    for _ in range(int(60 * minutes)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory.append(int(status.partition("VmRSS:")[2].split()[0]))
        files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
        time.sleep(1)
    process.signal(signal.SIGTERM)
    assert process.wait(60) == 143
    third = len(memory) // 3
    assert max(memory[-third:]) < 1.05 * max(memory[:third])
    assert max(files[-third:]) <= max(files[:third])


def unfinished(directory: Path) -> list[Path]:
    return [*(directory / "checkpoints").glob(".tmp-*")]


@pytest.mark.parametrize("kill", range(KILLS))
def test_law_7_a_process_killed_at_a_random_moment_loses_nothing(tmp_path, start, whole, kill):
    """Every other time inside the writing of a checkpoint; every third with $TMPDIR on another filesystem."""
    rng, run = random.Random(kill), tmp_path / "run"
    elsewhere = {"TMPDIR": "/dev/shm"} if kill % 3 == 2 and Path("/dev/shm").is_dir() else {}
    process = start(tmp_path, "train", "run_dir=run", *RUN, **elsewhere)
    process.wait_until(last(run).is_file)
    time.sleep(rng.uniform(0, 0.5))
    if kill % 2:
        process.wait_until(lambda: unfinished(run))
    process.signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    for path in {*(run / "checkpoints").iterdir()} - {*unfinished(run)}:
        read_checkpoint(str(path))  # whole: its checksums are verified
    assert start(tmp_path, "train", "run_dir=run", "ckpt=last", **elsewhere).wait(120) == 0
    assert not unfinished(run)
    assert_same_end(run, whole)


def slow_writer() -> None:
    """TensorBoard on a disk that takes its time (Drive, NFS): most signals strike while its lock is held."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriter

    flush = _AsyncWriter.flush

    def slow(self) -> None:
        with self._lock:
            time.sleep(0.03)
        flush(self)

    _AsyncWriter.flush = slow


@pytest.mark.parametrize("n", range(SIGNALS))
def test_law_9_a_signal_at_any_moment_ends_in_a_saved_run_or_in_its_own_end(tmp_path, start, whole, n):
    rng, run = random.Random(n), tmp_path / "run"
    signum, slow = SIGNUMS[n % 3], n % 2
    seconds = float((whole / "seconds.txt").read_text()) * (1.5 if slow else 1)
    process = start(tmp_path, "train", "run_dir=run", *RUN, before=slow_writer if slow else None)
    if n % 4:
        process.wait_until((run / "config.yaml").is_file)  # training begins
    time.sleep(rng.uniform(0.1, seconds / 2))
    if process.is_alive():
        process.signal(signum)
    code = process.wait(60)
    assert code in (0, 128 + signum)
    assert "Traceback" not in process.output()
    assert "ignored" not in process.output()  # as Python says of an exception inside a destructor
    assert not list(run.glob("hpc_ckpt*"))
    if code:
        again = ["ckpt=last"] if last(run).is_file() else RUN
        assert start(tmp_path, "train", "run_dir=run", *again).wait(120) == 0
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, *(pytest.param(signum, marks=pytest.mark.long) for signum in SIGNUMS[1:])]
)
def test_a_signal_saves_and_says_how_to_resume(tmp_path, start, whole, signum):
    settings = [*RUN, "callbacks.last.every_n_steps=null", "dataset.num_workers=2"]
    process = start(tmp_path, "train", "run_dir=run", *settings)
    process.wait_until((tmp_path / "run" / "checkpoints" / "best.ckpt").is_file)
    process.signal(signum)
    assert process.wait(60) == 128 + signum
    assert "Traceback" not in process.output()
    assert process.output().splitlines()[-1] == (
        "stopped; to resume, type: python -m pixelcnn_lit.train run_dir=run ckpt=last"
    )
    assert start(tmp_path, "train", "run_dir=run", "ckpt=last").wait(120) == 0
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("slow", [pytest.param(None, marks=pytest.mark.long), slow_writer])
def test_sigusr1_saves_and_requeues_the_job_which_then_ends_the_same(tmp_path, start, whole, slow):
    """It is typed the same again. The signal strikes while a logger flushes, as it may."""
    process = start(tmp_path, "train", "run_dir=run", *RUN, before=slow, **slurm(tmp_path))
    process.wait_until((tmp_path / "run" / "checkpoints" / "best.ckpt").is_file)
    process.signal(signal.SIGUSR1)
    assert process.wait(60) == 138
    assert (tmp_path / "asked.txt").read_text() == "requeue 77\n"
    again = start(tmp_path, "train", "run_dir=run", *RUN, **slurm(tmp_path), SLURM_RESTART_COUNT="1")
    assert again.wait(120) == 0
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in SIGNUMS[::2])])
def test_a_signal_to_all_processes_of_a_run_saves_it_as_one_to_the_first_does(tmp_path, start, whole, signum):
    """As Slurm, systemd and a terminal send it: to the workers of the loaders, too."""
    settings = [*RUN, "callbacks.last.every_n_steps=null", "dataset.num_workers=2"]
    process = start(tmp_path, "train", "run_dir=run", *settings)
    process.wait_until((tmp_path / "run" / "checkpoints" / "best.ckpt").is_file)
    os.killpg(process.pid, signum)
    assert process.wait_for_all(60) == 128 + signum
    assert "Traceback" not in process.output()
    assert start(tmp_path, "train", "run_dir=run", "ckpt=last").wait(120) == 0
    assert_same_end(tmp_path / "run", whole)


def test_a_requeue_that_fails_is_told_in_one_line_and_all_is_saved(tmp_path, start):
    environment = slurm(tmp_path)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 3\n")
    process = start(tmp_path, "train", "run_dir=run", *RUN, **environment)
    process.wait_until(last(tmp_path / "run").is_file)
    process.signal(signal.SIGUSR1)
    assert process.wait(60) == 138
    assert "scontrol requeue 77: failed (" in process.output()
    assert process.output().splitlines()[-1].startswith("stopped; to resume, type: ")


def test_a_second_ctrl_c_ends_the_program_at_once(tmp_path, start):
    """Here in the middle of a flush that never ends."""
    process = start(tmp_path, "train", "run_dir=run", *RUN, before=stuck_writer)
    process.wait_until((tmp_path / "stuck").is_file)
    process.signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.is_alive()
    process.signal(signal.SIGINT)
    assert process.wait(10) == 130


def stuck_writer() -> None:
    """TensorBoard on a disk that hangs once training has begun."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriter

    def stuck(self) -> None:
        if Path("run/config.yaml").is_file():
            Path("stuck").touch()
            time.sleep(60)

    _AsyncWriter.flush = stuck


def handles_signals(process: Child) -> bool:
    """Whether it has a handler for SIGTERM, as /proc tells."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks /proc for the moment")
@pytest.mark.parametrize("signum", SIGNUMS)
@pytest.mark.parametrize("name", ["train", pytest.param("sample", marks=pytest.mark.long)])
def test_a_signal_while_it_imports_ends_a_command_at_once(tmp_path, spawn, name, signum):
    process = spawn(tmp_path, name, "ckpt=mnist" if name == "sample" else "run_dir=run")
    process.wait_until(lambda: handles_signals(process), 10)
    time.sleep(random.Random(signum).uniform(0, 0.6))  # inside the imports of torch, which take longer
    process.signal(signum)
    assert process.wait(10) == 128 + signum
    assert process.output() == ""


def signalled_source() -> None:
    """A dataset in whose loading SIGTERM strikes."""
    import pixelcnn_lit.train

    pixelcnn_lit.train.image_data = lambda *_: os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_training_stops_without_a_traceback(tmp_path, start):
    process = start(tmp_path, "train", "run_dir=run", *RUN, before=signalled_source)
    assert process.wait(60) == 143
    assert process.output() == "stopped; nothing was saved yet\n"


OTHER_SYSTEM = """
import ctypes, multiprocessing, os, signal, sys
del signal.SIGUSR1, os.fork, os.sched_getaffinity
class CDLL(ctypes.CDLL):
    mallopt = property(lambda self: exec("raise AttributeError('mallopt')"))
ctypes.CDLL = CDLL
sys.modules["resource"] = None
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from pixelcnn_lit.runs.launch import launch
    launch("train")
"""


@pytest.mark.long
def test_it_trains_where_a_system_lacks_what_unix_has(tmp_path, children, whole):
    """As macOS and Windows do: without SIGUSR1, fork and mallopt, and with workers that are spawned."""
    (tmp_path / "program.py").write_text(OTHER_SYSTEM)
    process = children.popen(tmp_path, "program.py", "run_dir=run", *RUN, "dataset.num_workers=1")
    assert process.wait(120) == 0
    assert_same_end(tmp_path / "run", whole)


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


@pytest.mark.long
def test_a_full_disk_is_named_and_the_earlier_checkpoint_is_whole(small_disk, start, whole):
    run = small_disk / "run"
    process = start(small_disk, "train", "run_dir=run", *RUN)
    process.wait_until(last(run).is_file)
    filler = small_disk / "filler"
    size = sum(path.stat().st_size for path in (run / "checkpoints").iterdir())
    filler.write_bytes(bytes(max(0, 6 * 2**20 - size - 2**19)))
    assert process.wait(60) == 1
    output = process.output()
    assert "the disk is full" in output
    assert "bytes are needed" in output
    assert "Traceback" not in output
    assert not unfinished(run)
    filler.unlink()
    assert start(small_disk, "train", "run_dir=run", "ckpt=last").wait(120) == 0
    assert_same_end(run, whole)
