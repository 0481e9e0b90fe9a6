"""Going through the pixels of images: one by one, wavefront by wavefront, or all at once until nothing changes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from pixelcnn_lit.models.protocols import ImageDensity, Stepper
from pixelcnn_lit.nn.wavefronts import At, steps

Watch = Callable[[int], object]  # called with the number of pixels that a step has made


class Pick(Protocol):
    """A function that decides the levels of pixels."""

    def __call__(self, logits: Tensor, c: int, pixels: slice, /) -> Tensor:
        """Logits [B,V,n] of channel c of pixels, a slice of all in raster order -> levels [B,n]."""
        ...


class GuidedModel:
    """A model, asked for images of classes y [B], with what steers it.

    Guidance and mixing ask the network about another class, too: it then runs on 2B rows.

    Args:
        guidance_scale: s of uncond + s (cond - uncond) (Ho and Salimans 2022, equation 6, on logits); 1 is the model.
        mix_with, mix_weight: p = (1 - w) p(. | y) + w p(. | mix_with), value by value.
    """

    def __init__(
        self,
        density: ImageDensity,
        y: Tensor,
        guidance_scale: float = 1.0,
        mix_with: int | None = None,
        mix_weight: float = 0.5,
    ) -> None:
        self.density = density
        self.guidance_scale = guidance_scale
        self.mix_weight = mix_weight
        other = density.no_class if guidance_scale != 1 else mix_with
        self.asks_twice = other is not None
        self.noise_device = torch.device("cpu") if y.device.type == "mps" else y.device  # Apple's GPUs lack float64
        self.y = y if other is None else torch.cat([y, torch.full_like(y, other)])

    def rows(self, x: Tensor) -> Tensor:
        """The images x [B,...] once for each class that the network is asked about."""
        return x.repeat(2, *[1] * (x.ndim - 1)) if self.asks_twice else x

    def features(self, x: Tensor) -> Tensor:
        """Images [B,C,H,W] -> features of `rows`, in raster order, [B or 2B,D,H*W]."""
        return self.density.features(self.rows(x), self.y).flatten(2)

    def logits(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """log p(x_c | x_<c, earlier pixels) up to a constant: features of `rows`, x [B,C,...] -> [B,V,...], float64."""
        logits = self.density.likelihood.channel_logits(features, self.rows(x), c).to(self.noise_device).double()
        if not self.asks_twice:
            return logits
        wanted, other = logits.chunk(2)
        if self.guidance_scale != 1:
            return other + self.guidance_scale * (wanted - other)
        return torch.logaddexp(wanted + math.log1p(-self.mix_weight), other + math.log(self.mix_weight))


@torch.inference_mode()
def walk(
    model: GuidedModel,
    pick: Pick,
    canvas: Tensor,
    *,
    stepwise: bool = True,
    watch: Watch | None = None,
    n_steps: int | None = None,
) -> None:
    """Go through the pixels, or the first so many steps, and fill `canvas` uint8 [B,C,H,W] in place.

    The network, in eval mode, runs once a step: pixel by pixel on the whole image; or, `stepwise`, if it can step,
    wavefront by wavefront on those pixels alone. `watch` is called after each step.
    """
    _, channels, height, width = canvas.shape
    stepper = model.density.stepper(model.y) if stepwise else None
    features_at = WholeImages(model, canvas) if stepper is None else OneStep(model, stepper)
    flat = canvas.view(*canvas.shape[:2], -1)
    before = flat[..., :1]
    for at in islice(steps(height, width, width if stepper is None else stepper.skew), n_steps):
        features = features_at(before, at)
        now = flat[..., at.pixels]
        for c in range(channels):
            now[:, c] = pick(model.logits(features, now, c), c, at.pixels)
        before = now
        if watch:
            watch(now.shape[-1])


class WholeImages:
    """Features at a pixel from the whole image: correct for any network, and slow."""

    def __init__(self, model: GuidedModel, canvas: Tensor) -> None:
        self.model = model
        self.canvas = canvas

    def __call__(self, before: Tensor, at: At) -> Tensor:
        """Features [B,D,n] at a step."""
        return self.model.features(self.canvas)[..., at.pixels]


class OneStep:
    """Features at a wavefront from the one before it, as a network that steps computes them."""

    def __init__(self, model: GuidedModel, stepper: Stepper) -> None:
        self.model = model
        self.step = Replayed(stepper, model.y.device) if stepper.replayable and model.y.is_cuda else stepper.step

    def __call__(self, before: Tensor, at: At) -> Tensor:
        """The pixels before, [B,C,n] -> features [B,D,n] at a step."""
        previous = self.model.rows(before).permute(2, 0, 1).flatten(0, 1)  # pixel by pixel, image by image
        features = self.step(previous, at)
        return features.unflatten(0, (-1, len(self.model.y))).transpose(0, 1).contiguous().mT


class Replayed:
    """The steps of a stepper that is `replayable` as a CUDA graph.

    It is recorded at the second pixel of a row and replayed at all but the first of each: within a row, a step depends
    on `at.column_on_device` alone, so nothing waits for the host. A step repeated at its pixel writes the same, so it
    can be warmed up.
    """

    def __init__(self, stepper: Stepper, device: torch.device) -> None:
        self.stepper = stepper
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.previous: Tensor | None = None
        self.features: Tensor | None = None

    def __call__(self, previous: Tensor, at: At) -> Tensor:
        self.column.fill_(at.column)
        here = replace(at, column_on_device=self.column)
        if at.column == 0:
            return self.stepper.step(previous, here)
        if self.previous is None or self.features is None:
            self.previous = previous.clone()
            self.features = self._record(self.previous, here)
        self.previous.copy_(previous)
        self.graph.replay()
        return self.features

    def _record(self, previous: Tensor, at: At) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.stepper.step(previous, at)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # loaders pin memory meanwhile
            return self.stepper.step(previous, at)


@torch.no_grad()
def fixed_point(model: GuidedModel, pick: Pick, canvas: Tensor, watch: Watch | None = None) -> int:
    """Fill `canvas` by Jacobi iteration: all pixels at once from the image so far, until none changes.

    `pick` as in `walk`, for all pixels. Exact: after n iterations the first n pixels are final
    (Song et al. 2021, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, algorithm 1).
    Returns the number of evaluations; more than H W + 1 would mean that the network sees the future.
    """
    values = canvas.view(*canvas.shape[:2], -1)
    for n in range(values.shape[2] + 1):
        before = values.clone()
        features = model.features(canvas)
        for c in range(values.shape[1]):
            values[:, c] = pick(model.logits(features, values, c), c, slice(None))
        if torch.equal(before, values):
            return n + 1
        if watch:
            watch(1)  # it makes one or more pixels final
    raise AssertionError("no fixed point: the network is not causal")


@contextmanager
def eval_mode(module: nn.Module | ImageDensity) -> Iterator[None]:
    """Eval mode for a while, whoever asks, and the modes of before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
