"""Batches divided among processes: other processes change time, and no integer; and none is left behind."""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import LIKELIHOODS, NETWORKS, make

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs import workers
from pixelcnn_lit.runs.pace import Pace
from pixelcnn_lit.samplers import draw as drawing
from pixelcnn_lit.samplers.draw import Drawing, Request, cut, draw


def test_batches_are_as_few_as_do_and_as_equal_as_can_be():
    for n, batch_size in ((1, 1), (80, 64), (64, 64), (65, 64), (1000, 64), (7, 3), (5, 100)):
        parts = cut(n, batch_size)
        sizes = [part.stop - part.start for part in parts]
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert len(parts) == -(-n // batch_size)
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def pieces(model, image: torch.Tensor, processes: int, batch_size: int = 4, pace: Pace | None = None) -> torch.Tensor:
    """Nine completions of images of 3×4×5, with guidance."""
    known = torch.zeros(4, 5, dtype=torch.bool)
    known[:2] = True
    y = torch.tensor([0, 3, 1])
    request = Request(model, y, image, known, processes=processes, pace=pace)
    return draw(request, n_per_class=3, batch_size=batch_size, guidance_scale=2.0, seed=7)


@pytest.mark.parametrize(
    ("network", "likelihood"),
    [*((network, "categorical") for network in NETWORKS), *((NETWORKS[0], likelihood) for likelihood in LIKELIHOODS)],
)
def test_what_is_sent_to_another_process_draws_the_same_integers(monkeypatch, network, likelihood):
    def shared(tasks, here, there, arrived, processes):
        sent = there and pickle.loads(pickle.dumps(there))
        for n, task in enumerate(tasks):
            if sent and n != 1:
                arrived(n, sent(pickle.loads(pickle.dumps(task))))
            else:
                here(n)

    monkeypatch.setattr(drawing, "share", shared)
    model = make(network, likelihood, (3, 4, 5), levels=17, num_classes=4).float()
    image = torch.randint(17, (3, 3, 4, 5), dtype=torch.uint8)
    one, several = (pieces(model, image, processes) for processes in (1, 3))
    assert torch.equal(one, several)
    assert torch.equal(pieces(model, image, 1), one)  # the model is as it was


@pytest.fixture
def answered(monkeypatch) -> threading.Event:
    """Set when an answer has come from another process, which is started as soon as there is something left for it."""
    event = threading.Event()

    class Answers(queue.Queue):
        def put(self, item):
            super().put(item)
            event.set()

    monkeypatch.setattr(workers, "SimpleQueue", Answers)
    monkeypatch.setattr(workers, "WORTH", 0)
    return event


@pytest.mark.parametrize(("processes", "watch"), [(1, None), (2, None), (2, print)])
def test_other_processes_draw_for_those_who_ask_and_do_not_watch(monkeypatch, processes, watch):
    sent = []
    monkeypatch.setattr(drawing, "share", lambda tasks, here, there, arrived, processes: sent.append(there))
    model = make("pixelcnn", "categorical", (1, 4, 4), levels=17, num_classes=4)
    draw(Request(model, torch.tensor([0]), watch=watch, processes=processes))
    assert (sent != [None]) == (processes > 1 and watch is None)


def test_law_5_one_process_or_several_draw_the_same_integers(monkeypatch, answered):
    model = make("pixelcnn", "categorical", (3, 4, 5), levels=17, num_classes=4).float()
    image = torch.randint(17, (3, 3, 4, 5), dtype=torch.uint8)
    alone = pieces(model, image, 1)
    fill, pace = Drawing.fill, Pace()

    def slow(drawing, canvas, batch, watch):
        assert not pace._images or answered.wait(60)
        fill(drawing, canvas, batch, watch)

    monkeypatch.setattr(Drawing, "fill", slow)
    assert torch.equal(pieces(model, image, 2, pace=pace), alone)
    assert str(pace).endswith("images/s in 2 processes")


@pytest.fixture
def others(monkeypatch) -> list[subprocess.Popen]:
    """The processes that are started."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **own: started.append(popen(*args, **own)) or started[-1])
    return started


@pytest.fixture
def shared(answered) -> Callable[..., dict[int, Any]]:
    """A function that does tasks, and returns what came of each; of those done here, "here"."""

    def do(tasks: list[Any], there: Any, others_answer: bool = True) -> dict[int, Any]:
        done: dict[int, Any] = {}

        def here(n: int) -> None:
            assert n not in done
            assert not done or not others_answer or answered.wait(60)
            time.sleep(0.01)  # for others to come into the way
            done[n] = "here"

        def arrived(n: int, answer: Any) -> None:
            assert n not in done
            done[n] = answer

        workers.share(tasks, here, there, arrived, processes=3)
        return done

    return do


def test_each_task_is_done_once_and_no_process_is_left(others, shared):
    done = shared([str(n) for n in range(40)], eval)
    assert len(others) == 2
    assert sorted(done) == list(range(40))
    assert all(answer in ("here", n) for n, answer in done.items())
    assert len({type(answer) for answer in done.values()}) == 2  # here and there
    assert all(process.poll() is not None for process in others)


def test_what_is_not_worth_it_or_cannot_be_sent_is_done_here(others, shared, monkeypatch):
    for there, worth, n in ((lambda task: task, 0, 5), (eval, 8, 5), (eval, 0, 2)):
        monkeypatch.setattr(workers, "WORTH", worth)
        assert set(shared(["1"] * n, there, others_answer=False).values()) == {"here"}
    assert not others


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("from pixelcnn_lit.config.errors import UserError; raise UserError('mend this')", UserError, "mend this"),
        ("1 / 0", ZeroDivisionError, "division by zero"),
        ("import os; os._exit(9)", UserError, "was killed"),
        ("class Odd(Exception): pass\nraise Odd", RuntimeError, "cannot be sent"),
    ],
)
def test_the_error_of_another_process_is_the_commands(others, shared, task, error, message):
    with pytest.raises(error, match=message):
        shared(["", *[task] * 9], exec)
    assert all(process.poll() is not None for process in others)


def test_a_function_that_another_process_cannot_read_is_the_commands_error(others, shared, monkeypatch):
    monkeypatch.setattr(workers, "_pickled", lambda function: pickle.dumps(function)[:-1])
    with pytest.raises(pickle.UnpicklingError):
        shared([""] * 9, exec)


PARENT = """
import time
from pixelcnn_lit.runs import signals, workers

workers.WORTH = 0
task = "import os, time; os.write(1, b'alone: %d' % (os.getpgrp() == os.getpid())); time.sleep(600)"
with signals.raise_on_signals():
    workers.share([task] * 4, lambda n: time.sleep(600 * bool(n)), exec, print, 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no groups of processes")
@pytest.mark.parametrize("signum", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_no_process_outlives_its_parent_or_has_a_word_to_say(tmp_path, children, signum):
    """The signal goes to the whole group, as Ctrl-C does. What the other process prints goes to the parent's stderr."""
    number = getattr(signal, signum)
    parent = children.popen(tmp_path, "-c", PARENT)
    parent.wait_until(lambda: "alone: " in parent.output())
    os.killpg(parent.pid, number)
    assert parent.wait_for_all(60) == (-number if signum == "SIGKILL" else 128 + number)
    assert parent.output() == "alone: 1"  # in a group of its own
