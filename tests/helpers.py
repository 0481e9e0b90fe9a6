"""What several files of tests do."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.hydra import Hydra

from pixelcnn_lit.runs.command import run
from pixelcnn_lit.runs.launch import launch


def command(name: str, *overrides: str) -> None:
    """What `python -m pixelcnn_lit.<name>` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *overrides])
        patch.setattr(os, "fsync", lambda _: None)  # no file of a test has to outlive a power cut
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)  # it composes all once more, for a mode never set
        run(name)


def refused(name: str, *overrides: str) -> str:
    """The line that a command ends with where it cannot do what was typed."""
    with pytest.raises(SystemExit) as stop:
        command(name, *overrides)
    line = str(stop.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


# Runs and their data

TINY = [
    "model_size=tiny",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.limit_train_batches=4",
    "sampler.n_per_class=1",
]


def one_run(directory: Path, *overrides: str) -> dict:
    """Train a tiny model for two epochs in `directory`, on the digits if nothing else is asked for: its result.json."""
    command("train", *TINY, "trainer.max_epochs=2", f"run_dir={directory}", *overrides)
    return json.loads((directory / "result.json").read_text())


def leave_run(job: Path, command: str, overrides: list[str], **figures: float) -> None:
    """Make the directory of a run that is over, as `summarize` finds it; val_bpd is its "val/bpd"."""
    (job / "hydra").mkdir(parents=True)
    (job / "hydra" / "hydra.yaml").write_text(f"hydra: {{job: {{config_name: {command}}}}}")
    result = {"label": "digits", "overrides": overrides, "val/images": 9, "test/images": 9}
    result |= {"n_params": 1, "images_per_second": 1.0, "seconds": 1.0}
    result |= {name.replace("_", "/"): value for name, value in figures.items()}
    (job / "result.json").write_text(json.dumps(result))


class Killed(Exception):
    """Nothing is saved when it strikes, as nothing is at a SIGKILL."""


@contextlib.contextmanager
def killed(owner: type, method: str, after: int) -> Iterator[None]:
    """A run that ends inside, at call number `after` + 1 of a method of its module."""
    original, calls = getattr(owner, method), []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, dying)
        with pytest.raises(Killed):
            yield


def save_npz(
    path: Path, shape: tuple[int, ...] = (6, 5, 3), n: int = 40, n_test: int = 8, classes: int = 4, **changes: Any
) -> dict[str, np.ndarray]:
    """Write an archive of noise, which `changes` replaces or, where None, leaves out. Returns its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(256, size=(n, *shape), dtype=np.uint8),
        "train_labels": np.arange(n) % classes,
        "test_images": rng.integers(256, size=(n_test, *shape), dtype=np.uint8),
        "test_labels": np.arange(n_test) % classes,
        "class_names": np.array(list("abcdefghij")[:classes]),
    } | changes
    arrays = {key: value for key, value in arrays.items() if value is not None}
    np.savez(path, **arrays)
    return arrays


def archive(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as content:
        return dict(content)


# Commands as processes

GUARD = Path(__file__).parent / "guard.py"


class Child:
    """A command, and all that it starts."""

    def __init__(self, name: str, output: Path, pid: int, join: Callable[[float], int | None]) -> None:
        self.name = name
        self.pid = pid
        self._output = output
        self._join = join  # waits so many seconds: the exit code, or None while it runs

    def output(self) -> str:
        """What it has printed so far, on stdout and stderr."""
        return self._output.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self._join(0) is None

    def wait(self, seconds: float) -> int:
        """Return its exit code, -N where signal N ended it; fail, with its output, if it is not over by then."""
        code = self._join(seconds)
        assert code is not None, f"{self.name} still runs after {seconds} s; it printed:\n{self.output()}"
        return code

    def wait_until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait for a moment of its life; fail, with its output, if it ends or the time is up before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.is_alive(), f"{self.name} ended before its moment came; it printed:\n{self.output()}"
            assert time.monotonic() < end, (
                f"its moment never came in {seconds} s; {self.name} printed:\n{self.output()}"
            )
            time.sleep(0.005)

    def signal(self, signum: int) -> None:
        """Signal the process, not those it has started."""
        os.kill(self.pid, signum)

    def living(self) -> list[int]:
        """What lives of it and of all that it has started, as /proc tells."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, _, _, leader, *_ = path.read_text().rpartition(")")[2].split()
                if int(leader) == self.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def wait_for_all(self, seconds: float) -> int:
        """Wait for it and for all that it has started; return its exit code."""
        end = time.monotonic() + seconds
        code = self.wait(seconds)
        while left := self.living():
            assert time.monotonic() < end, f"{self.name} has left {left}; it printed:\n{self.output()}"
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """End it with all that it has started."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)  # in the first moments of a fork it has no group yet
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in self.living():  # of other groups
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(60)


class Children:
    """Commands started as processes that end, with all that they start, where the `with` ends or pytest dies.

    They run in `directory`, which is made if need be, with this process's environment and what is added. What they
    print is shown if the test fails.
    """

    def __enter__(self) -> "Children":
        self._started: list[Child] = []
        self._outputs = tempfile.TemporaryDirectory()
        self._guard = subprocess.Popen([sys.executable, GUARD], stdin=subprocess.PIPE, start_new_session=True)
        return self

    def start(
        self,
        directory: Path,
        name: str,
        *overrides: str,
        before: Callable[[], None] | None = None,
        **environment: str,
    ) -> Child:
        """`python -m pixelcnn_lit.<name>`, forked from a process that has everything imported: within 50 ms.

        `before` is called in the process first, to put a fault into it.
        """
        output = self._new_output(directory)
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["pytest", "pixelcnn_lit.train"])
        life = (directory, output, name, overrides, os.environ | environment, before)
        process = forks.Process(target=_command_in, args=life, daemon=True)
        process.start()

        def join(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        return self._watched(Child(name, output, process.pid, join))

    def spawn(self, directory: Path, name: str, *overrides: str, **environment: str) -> Child:
        """`python -m pixelcnn_lit.<name>`, typed: it imports all by itself."""
        return self.popen(directory, "-m", f"pixelcnn_lit.{name}", *overrides, **environment)

    def popen(self, directory: Path, *arguments: str, **environment: str) -> Child:
        """`python` with any arguments."""
        output = self._new_output(directory)
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=directory,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def join(seconds: float) -> int | None:
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None

        return self._watched(Child(" ".join(arguments[:2]), output, process.pid, join))

    def __exit__(self, *_: object) -> None:
        for child in self._started:
            child.kill()
            print(f"--- {child.name}, exit code {child.wait(0)}, printed:\n{child.output()}")
        self._guard.kill()
        self._guard.communicate()
        self._outputs.cleanup()

    def _new_output(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        return Path(self._outputs.name) / f"{len(self._started)}.txt"

    def _watched(self, child: Child) -> Child:
        self._started.append(child)
        self._guard.stdin.write(f"{child.pid}\n".encode())
        self._guard.stdin.flush()
        return child


def _command_in(
    directory: Path,
    output: Path,
    name: str,
    overrides: tuple[str, ...],
    environment: dict,
    before: Callable[[], None] | None,
) -> None:
    """The life of a forked process."""
    os.setsid()
    multiprocessing.current_process().daemon = False  # it may have workers, which end with its group
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default, as if typed
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from lightning.fabric.utilities import rank_zero

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0  # which Lightning asked for when it was imported
    sys.argv = [name, *overrides]
    if before:
        before()
    launch(name)


def slurm(directory: Path, tasks: int = 1, task: int = 0) -> dict[str, str]:
    """The environment of a task of Slurm's job 77, whose `scontrol` adds a line to directory/asked.txt."""
    scontrol = directory / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> '{directory}/asked.txt'\n")
    scontrol.chmod(0o755)
    own = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": str(tasks), "JOB_NODELIST": "localhost", "NODEID": "0"}
    own |= {"PROCID": str(task), "LOCALID": str(task), "NTASKS_PER_NODE": str(tasks)}
    return {f"SLURM_{key}": value for key, value in own.items()} | {"PATH": f"{directory}:{os.environ['PATH']}"}
