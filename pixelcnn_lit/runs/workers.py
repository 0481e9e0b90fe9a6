"""Tasks shared among processes of this machine. Nothing heavy is imported here, so that a process starts soon.

A process is a new interpreter, neither forked (unsafe once OpenMP has threads) nor one of `multiprocessing`, which
imports the parent's main module again. It reads its tasks from a pipe, whose end is that of its parent, however that
came: so it ends, too.
"""

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.memory import keep_freed_memory

WORTH = 8.0  # seconds of work left, from which on it pays to start processes, each of which takes some to start
LENGTH = struct.Struct("<Q")  # of a message in a pipe, in bytes


class _Failure(NamedTuple):
    """An error, in the place of an answer."""

    error: BaseException


def share(
    tasks: Sequence[Any],
    here: Callable[[int], None],
    there: Callable[[Any], Any] | None,
    arrived: Callable[[int, Any], None],
    processes: int,
) -> None:
    """Do each of the `tasks` once, in this process or, where that pays, in one of several.

    The first is done here, and tells whether it pays. So who does what follows the clock; what comes of a task must
    not. An error in another process is raised here. However this ends, no other process is left.

    Args:
        here: does the task at a position.
        there: does a task, in another process, to which it is sent once; None, or what cannot be pickled, never is.
        arrived: called in this process with a task's position and what `there` returned.
        processes: how many there may be, this one among them.
    """
    left = deque(range(len(tasks)))
    if not left:
        return
    began = time.perf_counter()
    here(left.popleft())
    seconds = len(left) * (time.perf_counter() - began)
    sent = _pickled(there) if there and seconds > WORTH else None
    others = min(processes, len(left)) - 1 if sent else 0
    answers: SimpleQueue[tuple[int | None, Any]] = SimpleQueue()
    unfinished = len(left)
    with _others(others, sent or b"", tasks, left, answers):
        while unfinished:
            position = _taken(left.pop) if answers.empty() else None
            if position is not None:
                here(position)
            else:
                position, answer = answers.get()
                if isinstance(answer, _Failure):
                    raise answer.error
                assert position is not None
                arrived(position, answer)
            unfinished -= 1


def _pickled(function: object) -> bytes | None:
    with contextlib.suppress(Exception):  # of pickle there are several kinds
        return pickle.dumps(function)
    return None


def _taken(pop: Callable[[], int]) -> int | None:
    """A position that was left to do. Several threads ask."""
    with contextlib.suppress(IndexError):
        return pop()
    return None


@contextlib.contextmanager
def _others(
    count: int, sent: bytes, tasks: Sequence[Any], left: deque[int], answers: SimpleQueue[tuple[int | None, Any]]
) -> Iterator[None]:
    """Other processes that do tasks, from the first `left` on, each with a thread here that hands them over."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    # Ctrl-C in a terminal reaches all processes of its group, and is the parent's affair.
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    started: list[tuple[subprocess.Popen, threading.Thread]] = []
    try:
        for _ in range(count):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen([sys.executable, "-c", code], **pipes, **apart)
            thread = threading.Thread(target=_hand_over, args=(process, sent, tasks, left, answers), daemon=True)
            thread.start()
            started.append((process, thread))
        yield
    finally:
        for process, _ in started:
            process.kill()
        for process, thread in started:
            process.wait()
            thread.join()


def _hand_over(
    process: subprocess.Popen,
    sent: bytes,
    tasks: Sequence[Any],
    left: deque[int],
    answers: SimpleQueue[tuple[int | None, Any]],
) -> None:
    """Let a process do what is `left`, task after task, each taken when the process is ready for it."""
    position = None
    try:
        with process.stdin as to, process.stdout as back:  # pyright: ignore[reportOptionalContextManager]
            _send(to, sent)
            ready = pickle.loads(_receive(back))
            if isinstance(ready, _Failure):
                raise ready.error
            while (position := _taken(left.popleft)) is not None:
                _send(to, pickle.dumps(tasks[position]))
                answers.put((position, pickle.loads(_receive(back))))
    except (EOFError, BrokenPipeError):
        answers.put((position, _Failure(UserError(
            "another process of this command was killed, perhaps for want of memory; type a smaller sampler.batch_size,"
            " or a larger threads, which makes fewer processes"
        ))))  # fmt: skip
    except Exception as error:  # whatever it is, nobody must wait for an answer
        answers.put((position, _Failure(error)))


def serve() -> None:
    """Be another process: read a function, then do task after task with it, until the parent is gone."""
    given, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here is no answer
    keep_freed_memory()
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(given, inbox), daemon=True).start()
    there = _answer(pickle.loads, inbox.get())
    with contextlib.suppress(BrokenPipeError):
        _send(answers, _dumped(there if isinstance(there, _Failure) else None))
        while True:
            _send(answers, _dumped(_answer(there, pickle.loads(inbox.get()))))
    os._exit(0)


def _listen(given: IO[bytes], inbox: SimpleQueue[bytes]) -> None:
    """Pass on what the parent sends, and end this process at once when there is no parent, whatever it does."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(_receive(given))
    os._exit(0)


def _answer(function: Any, argument: object) -> object:
    """Return what a function makes of its argument, or the error that it raises."""
    try:
        return function(argument)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # of this process, to be seen in the other
        return _Failure(error)


def _dumped(answer: object) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception:
        return pickle.dumps(_Failure(RuntimeError(f"{answer!r} cannot be sent to the other process")))


def _send(file: IO[bytes], content: bytes) -> None:
    file.write(LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def _receive(file: IO[bytes]) -> bytes:
    """The next message; EOFError where there is none."""
    head = file.read(LENGTH.size)
    content = file.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    if not head or len(content) != LENGTH.unpack(head)[0]:
        raise EOFError
    return content
