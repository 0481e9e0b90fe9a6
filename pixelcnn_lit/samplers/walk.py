"""Going through the pixels of images: one by one, front by front, or all at once until nothing changes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pixelcnn_lit.nn.fronts import Front, fronts

Pick = Callable[..., Tensor]


Watch = Callable[[int], None]


class Conditioned:
    """A network and a likelihood, asked for images of classes y [B], with what steers them.

    Guidance and mixing ask the network about another class, too: it then runs on 2B rows.

    Args:
        guidance_scale: s of uncond + s (cond - uncond) (Ho and Salimans 2022, equation 6, on logits); 1 is the model.
        mix_with, mix_weight: p = (1 - w) p(. | y) + w p(. | mix_with), value by value.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Any,
        y: Tensor,
        no_class: int,
        guidance_scale: float = 1.0,
        mix_with: int | None = None,
        mix_weight: float = 0.5,
    ) -> None:
        self.net, self.likelihood, self.scale, self.weight = net, likelihood, guidance_scale, mix_weight
        other = no_class if guidance_scale != 1 else mix_with
        self.twice = other is not None
        self.noise_device = torch.device("cpu") if y.device.type == "mps" else y.device  # Apple's GPUs lack float64
        self.y = torch.cat([y, torch.full_like(y, other)]) if other is not None else y

    def rows(self, x: Tensor) -> Tensor:
        """The images x [B,...] once for each class the network is asked about."""
        return x.repeat(2, *[1] * (x.ndim - 1)) if self.twice else x

    def logits(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """log p(x_c | x_<c, earlier pixels) up to a constant: features of `rows`, x [B,C,...] -> [B,V,...], float64."""
        logits = self.likelihood.channel_logits(features, self.rows(x), c).to(self.noise_device).double()
        if not self.twice:
            return logits
        wanted, other = logits.chunk(2)
        if self.scale != 1:
            return other + self.scale * (wanted - other)
        return torch.logaddexp(wanted + math.log1p(-self.weight), other + math.log(self.weight))


@torch.inference_mode()
def walk(
    target: Conditioned,
    pick: Pick,
    canvas: Tensor,
    *,
    stepwise: bool = True,
    watch: Watch | None = None,
    steps: int | None = None,
) -> None:
    """Go through the pixels, or the first so many steps, and fill `canvas` uint8 [B,C,H,W] in place.

    The network, in eval mode, runs once a step: in raster order, on the whole image; or, `stepwise`, on the pixel
    alone, and if it has a `skew` on a front of pixels (see `fronts`). `pick(logits [B,V,n], c, pixels)` returns the
    levels [B,n] of channel c of these pixels, a slice of all in raster order. `watch(n)` is called after each step.
    """
    _, channels, height, width = canvas.shape
    skew = getattr(target.net, "skew", width) if stepwise else width
    features_at = _stepper(target) if stepwise else _evaluator(target, canvas)
    flat = canvas.view(*canvas.shape[:2], -1)
    values = flat[..., :1]
    for i, j in islice(fronts(height, width, skew), steps):
        pixels = Front.of(i, j, width, skew).as_slice(width, skew)
        features, values = features_at(values, i, j, pixels), flat[..., pixels]
        for c in range(channels):
            values[:, c] = pick(target.logits(features, values, c), c, pixels)
        if watch:
            watch(values.shape[-1])


FeaturesAt = Callable[[Tensor, int, int, slice], Tensor]  # (the pixels before [B,C,n], i, j, pixels) -> [B,D,n]


def _evaluator(target: Conditioned, canvas: Tensor) -> FeaturesAt:
    return lambda before, i, j, pixels: target.net(target.rows(canvas), target.y).flatten(2)[..., pixels]


def _stepper(target: Conditioned) -> FeaturesAt:
    net: Any = target.net
    cache = net.init_cache(target.y)
    replayed = target.y.is_cuda and getattr(net, "replayable", False)
    step = _replayed(net, cache, target.y.device) if replayed else partial(net.step, cache)

    def features_at(before: Tensor, i: int, j: int, pixels: slice) -> Tensor:
        features = step(target.rows(before).permute(2, 0, 1).flatten(0, 1), i, j)
        return features.unflatten(0, (-1, len(target.y))).transpose(0, 1).contiguous().mT

    return features_at


def _replayed(net: Any, cache: dict[str, Any], device: torch.device) -> Callable[[Tensor, int, int], Tensor]:
    """`net.step` as a CUDA graph, recorded at the second pixel of a row and replayed at all but the first of each.

    For networks that are `replayable`: i and j only tell them whether a row begins, the column is cache["column"], on
    the device, so nothing waits for the host. A step repeated at its pixel writes the same, so it can be warmed up.
    """
    column = cache["column"] = torch.zeros(1, dtype=torch.int64, device=device)
    graph, held = torch.cuda.CUDAGraph(), {}

    def step(previous: Tensor, i: int, j: int) -> Tensor:
        column.fill_(j)
        if j == 0:
            return net.step(cache, previous, i, j)
        if not held:
            held["previous"] = previous.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                net.step(cache, held["previous"], i, j)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory meanwhile
                held["features"] = net.step(cache, held["previous"], i, j)
        held["previous"].copy_(previous)
        graph.replay()
        return held["features"]

    return step


@torch.no_grad()
def fixed_point(target: Conditioned, pick: Pick, canvas: Tensor, watch: Watch | None = None) -> int:
    """Fill `canvas` by Jacobi iteration: all pixels at once from the image so far, until none changes.

    `pick` as in `walk`, for all pixels. Exact: after n iterations the first n pixels are final
    (Song et al. 2021, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, algorithm 1).
    Returns the number of evaluations; more than H W + 1 would mean that the network sees the future.
    """
    values = canvas.view(*canvas.shape[:2], -1)
    for n in range(values.shape[2] + 1):
        before, features = values.clone(), target.net(target.rows(canvas), target.y).flatten(2)
        for c in range(values.shape[1]):
            values[:, c] = pick(target.logits(features, values, c), c, slice(None))
        if torch.equal(before, values):
            return n + 1
        if watch:
            watch(1)  # it makes one or more pixels final
    raise AssertionError("no fixed point: the network is not causal")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while, whoever asks, and the modes of before afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
