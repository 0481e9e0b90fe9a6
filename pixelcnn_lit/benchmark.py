"""Measure how fast this machine trains and samples.

Ratios, timed side by side in one run; no figure is stored in code.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("benchmark")

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval, MinLen
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from pixelcnn_lit.codec.coder import compress, decompress
from pixelcnn_lit.codec.format import MAX_BATCH
from pixelcnn_lit.config.build import build
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.density.warm_start import refuse_own
from pixelcnn_lit.nn.layers import CausalConv2d
from pixelcnn_lit.nn.wavefronts import steps
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import (
    Threads,
    best_device,
    cores,
    fast_bf16,
    made_with,
    on_threads,
    step_work,
    take_threads,
)
from pixelcnn_lit.runs.run_dir import relative, run_dir, typed
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.samplers.draw import half_precision
from pixelcnn_lit.samplers.pick import picker
from pixelcnn_lit.samplers.walk import GuidedModel, Pick, eval_mode, fixed_point, walk

NAIVE_PIXELS = 4  # each costs the same, so a few tell of all
CACHED_STEPS = 32  # likewise
PUBLISHED = "as published"
Timed = dict[str, Callable[[], Any]]
Size = Annotated[int, Ge(1)]
BatchSize = Annotated[int, Interval(ge=1, le=MAX_BATCH)]


def main(
    model: dict[str, Any],
    likelihood: dict[str, Any],
    optimizer: dict[str, Any],
    image_shape: tuple[Size, Size, Size],
    levels: Annotated[int, Interval(ge=2, le=256)],
    ckpt: str | None,
    batch_size: BatchSize | Annotated[list[BatchSize], MinLen(1)],
    rounds: Annotated[int, Ge(1)],
    compile: bool,
    busy: bool,
    threads: Threads,
) -> None:
    to_sample = take_threads(threads)
    device = best_device()
    facts: dict[str, Any] = {"image_shape": image_shape, "levels": levels, "num_classes": 10, "class_names": []}
    torch.manual_seed(0)
    density = trained(ckpt) if ckpt else Density(model=model, likelihood=likelihood, **facts)
    density.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    first, *others = batch_size if isinstance(batch_size, list) else [batch_size]
    x, y = batch(density, first)
    with foreign_load(cores() if busy else 0):
        sampling = sampling_rows(density, x, y, rounds)
        more = {f"sampling, batch {n}": sampling_rows(density, *batch(density, n), rounds) for n in others}
        published = as_published(density)
        to_train = take_threads(threads, step_work(density, density.image_shape, first))
        seconds = medians(training_steps(density, published, optimizer, x, y, compile), rounds)
        tables = {"training": training_rows(density, published, x, y, seconds), "sampling": sampling, **more}
        if device.type == "cpu" and cores() > 1:
            tables["threads"] = threads_rows(density, optimizer, x, y, rounds)
    head = made_with(device) | {"threads to train": to_train, "threads to sample": to_sample}
    head |= {"weights": ckpt or "untrained", "busy": busy}
    head |= {"parameters": sum(p.numel() for p in density.parameters())}
    head |= {"batch_size": first, "image_shape": list(density.image_shape)}
    atomic_write_text(run_dir() / "benchmark.json", json.dumps({**head, **tables}, indent=2))
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    print(*(table(name, rows) for name, rows in tables.items()), relative(run_dir() / "benchmark.json"), sep="\n")


def trained(ckpt: str) -> Density:
    """Return the model of a checkpoint. Raises UserError where another was typed."""
    refuse_own(typed(), "ckpt", also=("image_shape", "levels"))
    return load(ckpt)


def batch(density: Density, n: int) -> tuple[Tensor, Tensor]:
    """Return n random images of a model and classes in turn, on its device."""
    x = torch.randint(density.levels, (n, *density.image_shape), dtype=density.level_dtype, device=density.device)
    return x, torch.tensor(density.classes, device=density.device).repeat(n)[:n]


@contextmanager
def foreign_load(processes: int) -> Iterator[None]:
    """So many other processes that each keep a core busy meanwhile, and no longer than this one lives."""
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def medians(timed: Timed, rounds: int) -> dict[str, float]:
    """Seconds of each, taken in turns so that whatever else the machine does falls on all alike; warmed up first."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round in progress(range(rounds + 1), desc="measuring", unit=" rounds"):
        for name, function in timed.items():
            began = time.perf_counter()
            function()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if round:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_steps(
    density: Density, published: Density, optimizer: dict[str, Any], x: Tensor, y: Tensor, compile: bool
) -> Timed:
    """A whole step in each precision, one of the published network, and a plain dense convolution, the ceiling."""
    adam = {"_target_": "torch.optim.adam.Adam"}
    timed: Timed = {PUBLISHED: training_step(published, adam, x, y, bf16=False)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        timed[name] = training_step(density, optimizer, x, y, bf16=name == "bf16")
        timed[f"{name} ceiling"] = _dense_convolution(density, x, dtype)
    if compile:
        timed["bf16 compiled"] = training_step(density, optimizer, x, y, bf16=True, compile=True)
    return timed


def training_step(
    density: Density, optimizer: dict[str, Any], x: Tensor, y: Tensor, bf16: bool, compile: bool = False
) -> Callable[[], None]:
    nats = torch.compile(density.forward) if compile else density.forward
    built = build("optimizer", optimizer, Optimizer, params=density.parameters())

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = nats(x, y).mean()
        built.zero_grad()
        loss.backward()
        built.step()

    return step


def as_published(density: Density) -> Density:
    """The published PixelCNN of the same size, with its dense masked kernels and contiguous: the reference."""
    size = {key: density.settings["model"][key] for key in ("hidden_channels", "n_residual")}
    embedding = {"_target_": "pixelcnn_lit.nn.embeddings.ScaledLevels"}
    target = "pixelcnn_lit.models.pixelcnn_published.PublishedPixelCNN"
    model = {"_target_": target, "embedding": embedding, **size}
    likelihood = {"_target_": "pixelcnn_lit.likelihoods.categorical.Categorical", "colour": "independent"}
    settings: dict[str, Any] = density.settings | {"model": model, "likelihood": likelihood | {"ordinal": False}}
    return with_dense_kernels(Density(**settings).to(density.device))


def with_dense_kernels(density: Density) -> Density:
    """The same model, each causal convolution as one of dense kernels."""
    for parent in list(density.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, CausalConv2d):
                setattr(parent, name, DenseConv2d(layer))
    return density


class DenseConv2d(nn.Module):
    """A masked convolution as published: a dense k×k kernel, multiplied by its mask in each forward."""

    mask: Tensor

    def __init__(self, layer: CausalConv2d) -> None:
        super().__init__()
        dead = (0, 0, 0, layer.weight.shape[3] - layer.weight.shape[2])
        self.weight, self.bias, self.side = nn.Parameter(F.pad(layer.weight.detach(), dead)), layer.bias, layer.side
        self.register_buffer("mask", F.pad(layer.mask, dead))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.side)


def _dense_convolution(density: Density, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of one unmasked 3×3 convolution, channels last."""
    width = density.settings["model"]["hidden_channels"]
    size, weight = (len(x), width, *x.shape[2:]), (width, width, 3, 3)
    a, w, gradient = (torch.randn(s, device=x.device, dtype=dtype) for s in (size, weight, size))
    a, w, gradient = (t.to(memory_format=torch.channels_last) for t in (a, w, gradient))
    for leaf in (a, w):
        leaf.requires_grad_()
    return lambda: F.conv2d(a, w, padding=1).backward(gradient)


def training_rows(
    density: Density, published: Density, x: Tensor, y: Tensor, seconds: dict[str, float]
) -> dict[str, Any]:
    width = density.settings["model"]["hidden_channels"]
    work = {True: live_flops(published, x, y), False: live_flops(density, x, y)}
    dense = 3 * 2 * len(x) * x.shape[2] * x.shape[3] * width * width * 9
    rows = {}
    for name in [name for name in seconds if not name.endswith("ceiling")]:
        rate = work[name == PUBLISHED] / seconds[name]
        ceiling = dense / seconds["bf16 ceiling" if name.startswith("bf16") else "fp32 ceiling"]
        rows[f"training, {name}"] = {
            "images/s": len(x) / seconds[name],
            "times as published": seconds[PUBLISHED] / seconds[name],
            "GFLOP/s": rate / 1e9,
            "of a dense convolution": rate / ceiling,
        }
    return rows


def live_flops(density: Density, x: Tensor, y: Tensor) -> int:
    """Count the operations of forward and backward, without the products that masks make zero."""
    dead = 0

    def count(layer: CausalConv2d | DenseConv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal dead
        products = 2 + inputs[0].requires_grad  # with the kernel, and backward for the kernel and for what came in
        dead += 2 * products * output[:, 0].numel() * layer.weight[..., 0, 0].numel() * int((layer.mask == 0).sum())

    hooks = [m.register_forward_hook(count) for m in density.modules() if isinstance(m, CausalConv2d | DenseConv2d)]
    with FlopCounterMode(display=False) as counted:
        density(x, y).mean().backward()
    for hook in hooks:
        hook.remove()
    return counted.get_total_flops() - dead - dead_attention(counted.get_flop_counts()["Global"], x[0, 0].numel())


def dead_attention(counted: dict[Any, int], pixels: int) -> int:
    """Count, of causal attention, the products with later pixels, and what its backward pass computes a second time."""
    flops = {str(op): n for op, n in counted.items() if "scaled_dot_product" in str(op)}
    forward = sum(n for op, n in flops.items() if "backward" not in op)
    return sum(flops.values()) - 3 * forward * (pixels + 1) // (2 * pixels)


@torch.no_grad()
def sampling_rows(density: Density, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Each sampler beside one forward pass over the same batch: the cached one and the codec, or the fixed point.

    An evaluation is one of the whole image or a step.
    """
    canvas, pixels = torch.zeros_like(x), x[0, 0].numel()
    model = GuidedModel(density, y)
    pick = picker(torch.rand(x.shape, dtype=torch.float64, device=model.noise_device))
    some = min(NAIVE_PIXELS, pixels)
    timed: Timed = {
        "one forward": lambda: density.features(x, y),
        "naive": lambda: walk(model, pick, canvas, stepwise=False, n_steps=some),
    }
    evaluations = {"one forward": 1, "naive": pixels}
    if density.can_step:
        stepping = stepwise(density, model, pick, x)
        timed |= stepping
        evaluations |= dict.fromkeys(stepping, n_steps(density, y))

    def draw_by_fixed_point() -> None:
        evaluations["fixed_point"] = fixed_point(model, pick, torch.zeros_like(x))

    if not density.can_step:
        timed["fixed_point"] = draw_by_fixed_point
    with eval_mode(density), parametrize.cached():
        seconds = medians(timed, rounds)
    seconds["naive"] *= pixels / some
    return {
        f"sampling, {name}": {
            "images/s": len(x) / seconds[name],
            "forward passes": seconds[name] / seconds["one forward"],
            "times naive": seconds["naive"] / seconds[name],
            "evaluations": evaluations[name],
        }
        for name in timed
    }


def n_steps(density: Density, y: Tensor) -> int:
    """Return how many steps an image takes."""
    _, height, width = density.image_shape
    return sum(1 for _ in steps(height, width, density.stepper(y).skew))


def threads_rows(density: Density, optimizer: dict[str, Any], x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """A training step and the cached sampler on one thread and on all: what an idle machine gains, a busy one loses."""
    pick, canvas = picker(torch.rand(x.shape, dtype=torch.float64)), torch.zeros_like(x)
    model = GuidedModel(density, y)

    def sample() -> None:
        with eval_mode(density), parametrize.cached():
            walk(model, pick, canvas, n_steps=CACHED_STEPS)

    kinds = {"training": training_step(density, optimizer, x, y, bf16=fast_bf16("cpu"))}
    whole = {"training": 1.0}
    if density.can_step:
        kinds["cached"] = sample
        whole["cached"] = max(1.0, n_steps(density, y) / CACHED_STEPS)
    rows = {f"{kind}, threads={n}": (kind, n) for kind in kinds for n in (1, cores())}
    seconds = medians({row: partial(_on, n, kinds[kind]) for row, (kind, n) in rows.items()}, rounds)
    return {
        row: {
            "images/s": len(x) / (seconds[row] * whole[kind]),
            "times threads=1": seconds[f"{kind}, threads=1"] / seconds[row],
        }
        for row, (kind, _) in rows.items()
    }


def _on(threads: int, run: Callable[[], Any]) -> None:
    with on_threads(threads):
        run()


def stepwise(density: Density, model: GuidedModel, pick: Pick, x: Tensor) -> Timed:
    """Return what goes through images step by step: the cached sampler, and the codec."""
    half = GuidedModel(half_precision(density), model.y)
    canvas, images = torch.zeros_like(x), Split(x.cpu(), model.y.cpu())
    file = compress(density, images, len(x)).content
    return {
        "cached": lambda: walk(model, pick, canvas),
        "cached, bf16": lambda: walk(half, pick, canvas),
        "compress": lambda: compress(density, images, len(x)),
        "decompress": lambda: decompress(density, file, "the benchmark's own file"),
    }


def table(name: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"{name:<26}" + "".join(f"{column:>24}" for column in columns)]
    lines += [f"{name:<26}" + "".join(f"{row[column]:>24.4g}" for column in columns) for name, row in rows.items()]
    return "\n".join(lines)
