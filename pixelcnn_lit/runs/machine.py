"""The machine: what it is fast at, and how much of it a command takes."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from torch import nn

from pixelcnn_lit.runs.release import RELEASE, WRITTEN_BY

# What is computed in float32 is float32: CUDA's convolutions otherwise keep 10 bits of the mantissa (TF32). Here, since
# every command passes here.
torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]

MOST_THREADS = 1024
Threads = Annotated[int, Interval(ge=1, le=MOST_THREADS)] | None  # as a command takes them: see `chosen_threads`
# `step_work` from which on several threads are worth it. Beside four other programs on two cores, a training step on
# two threads was 0.2 to 0.35 times as fast as on one up to 2e10, 0.6 at 4e10, and 0.8 at 1e11; alone on them it gains.
LARGE = 5e10


def fast_bf16(accelerator: str) -> bool:
    """Return whether bf16 is native: CUDA since Ampere; CPUs with AMX or AVX-512 BF16. Apple's GPUs train in fp32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def best_device() -> torch.device:
    """Return where to sample: the accelerator of this machine, if it has one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def made_with(device: torch.device) -> dict[str, str]:
    """Return what a file of results says of where its figures come from: the releases, and the hardware."""
    return {WRITTEN_BY: RELEASE, "torch": str(torch.__version__), "hardware": hardware(device)}


def hardware(device: torch.device) -> str:
    """Return the name of a GPU; of CPUs how many cores of which, and the instructions that torch makes use of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux, whose `platform` does not know
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{cores()} x {name}, {torch.backends.cpu.get_cpu_capability()}{amx}"


def cores() -> int:
    """Return how many CPU cores this process may use."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or one without a limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        here = min(here, -(-int(quota) // int(period)))
    return here


def chosen_threads(typed: int | None, work: float = 0, processes: int = 1) -> int:
    """Return how many threads of the CPU each of the `processes` takes.

    That is the number `typed`; or OMP_NUM_THREADS; or one, and of `work` that is LARGE all cores that are a process's
    share. Never what the machine has to spare just now: the order of sums, and so their last bits, depend on it.
    """
    if typed is not None:
        return typed
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # OpenMP takes one for each nested level
    if asked.isdecimal() and int(asked):
        return int(asked)
    return max(1, cores() // processes) if work >= LARGE else 1


def step_work(module: nn.Module, image_shape: tuple[int, ...] | list[int], images: int) -> float:
    """Roughly the products in one pass of so many images [C,H,W]: parameters times pixels times images."""
    return float(sum(p.numel() for p in module.parameters()) * image_shape[1] * image_shape[2] * images)


def take_threads(typed: int | None, work: float = 0, processes: int = 1) -> int:
    """Let torch have `chosen_threads`, and return their number."""
    threads = chosen_threads(typed, work, processes)
    torch.set_num_threads(threads)
    return threads


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """So many threads for a while, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processes_of(threads: int) -> int:
    """Return how many processes of so many threads the machine has cores for."""
    return max(1, cores() // threads)


def say_threads(device: torch.device, threads: int, processes: int = 1, what: str = "") -> None:
    """Print a line on what is taken of the CPU, and what to type for another number; nothing on another device."""
    if device.type != "cpu":
        return
    here = cores()
    taken = f"{threads} of {here} CPU threads" if threads <= here else f"{threads} CPU threads on {here} cores"
    taken += f" {what}" if what else ""
    if processes > 1:
        taken += f" in each of up to {processes} processes"
    elif threads < here:
        taken += f" (threads={here} may be faster, but not beside other programs)"
    elif threads > 1:
        taken += " (beside other programs threads=1 is faster)"
    print(taken, flush=True)
