"""Sampling as a function of noise: three ways to one answer, and all that steers it.

Image n of a request is a function of (seed, n) and of the model: u ~ U[0,1)^[C,H,W], and each value is the inverse of
the cumulative distribution at its u. So the same request gives the same images, whatever the method, the batch or the
device (up to rounding, which can move a draw that lies on a boundary).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pixelcnn_lit.build import Range
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.noise import uniform

Pick = Callable[[Tensor, int, int, int], Tensor]
Watch = Callable[[Tensor, int], None]


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
        logits = self.likelihood.channel_logits(features, self.rows(x), c).to(self.noise_device, torch.float64)
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
    progress: bool = False,
) -> Tensor:
    """Go through the pixels in raster order and fill `canvas` uint8 [B,C,H,W] in place.

    `pick(logits [B,V], c, i, j)` returns the level, int64 [B], of channel c at row i, column j. The network, in eval
    mode, runs once a pixel: on the pixel alone where it can step, else on the whole image. `watch(canvas, p)` is
    called after each pixel.
    """
    _, channels, height, width = canvas.shape
    features_at = _stepper(target) if stepwise else _evaluator(target, canvas)
    previous = canvas[:, :, 0, 0]
    for p in tqdm(range(height * width), unit=" pixels", disable=not progress, leave=False):
        i, j = divmod(p, width)
        features, pixel = features_at(previous, i, j), canvas[:, :, i, j]
        for c in range(channels):
            pixel[:, c] = pick(target.logits(features, pixel, c), c, i, j)
        previous = pixel
        if watch:
            watch(canvas, p)
    return canvas


def _evaluator(target: Conditioned, canvas: Tensor) -> Callable[[Tensor, int, int], Tensor]:
    return lambda _, i, j: target.net(target.rows(canvas), target.y)[:, :, i, j]


def _stepper(target: Conditioned) -> Callable[[Tensor, int, int], Tensor]:
    net: Any = target.net
    cache = net.init_cache(target.y)
    replayed = target.y.is_cuda and getattr(net, "replayable", False)
    step = _replayed(net, cache, target.y.device) if replayed else partial(net.step, cache)
    return lambda previous, i, j: step(target.rows(previous), i, j)


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
def fixed_point(target: Conditioned, pick_all: Callable[[Tensor, int], Tensor], canvas: Tensor) -> int:
    """Fill `canvas` by Jacobi iteration: all pixels at once from the image so far, until none changes.

    `pick_all(logits [B,V,H,W], c)` returns levels [B,H,W]. Exact: after n iterations the first n pixels are final
    (Song et al. 2021, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, algorithm 1).
    Returns the number of evaluations; more than H W + 1 would mean that the network sees the future.
    """
    for n in range(canvas.shape[2] * canvas.shape[3] + 1):
        before, features = canvas.clone(), target.net(target.rows(canvas), target.y)
        for c in range(canvas.shape[1]):
            canvas[:, c] = pick_all(target.logits(features, canvas, c), c)
        if torch.equal(before, canvas):
            return n + 1
    raise AssertionError("no fixed point: the network is not causal")


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The level [B,...] at which the cumulative distribution of logits [B,V,...] passes u [B,...], in float64.

    That is the number of all values of the distribution but the last, 1, that are <= u.
    """
    cdf = logits.movedim(1, -1).double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, u[..., None].contiguous(), right=True)[..., 0].clamp_(max=cdf.shape[-1] - 1)


def sharpened(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """logits [B,V,...] divided by the temperature; of the levels, the `top_k` likeliest and the fewest with mass top_p.

    top_p: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, equation 3.
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[1]:
        kept = logits.topk(top_k, dim=1).indices
        logits = torch.full_like(logits, -math.inf).scatter(1, kept, logits.gather(1, kept))
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        p = ordered.softmax(1)
        beyond = p.cumsum(1) - p >= top_p  # the mass before it is enough; the first always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
    return logits


def draw(
    net: nn.Module,
    likelihood: Any,
    y: Tensor,
    image_shape: tuple[int, int, int],
    num_classes: int,
    known_classes: list[int],
    *,
    method: Literal["naive", "cached", "fixed_point"] = "cached",
    n_per_class: Annotated[int, Range(1)] = 1,
    seed: Annotated[int, Range(0)] = 0,
    temperature: Annotated[float, Range(0.001)] = 1.0,
    top_k: Annotated[int | None, Range(1)] = None,
    top_p: Annotated[float, Range(0.001, 1)] = 1.0,
    guidance_scale: Annotated[float, Range(0, 100)] = 1.0,
    mix_with: Annotated[int | None, Range(0)] = None,
    mix_weight: Annotated[float, Range(0.001, 0.999)] = 0.5,
    image: Tensor | None = None,
    known: Tensor | None = None,
    watch: Watch | None = None,
    progress: bool = False,
) -> Tensor:
    """`n_per_class` images of each class in y int64 [K] in turn: uint8 [B=K*n_per_class,C,H,W].

    Args:
        known_classes: those the model was trained on, of 0..num_classes, where `num_classes` means "no class".
        method: "naive" evaluates the network on the whole image once a pixel; "cached" on the pixel alone, where the
            network can step, else as "fixed_point"; "fixed_point" on the whole image until nothing changes.
        temperature, top_k, top_p: see `sharpened`. guidance_scale, mix_with, mix_weight: see `Conditioned`.
        image, known: uint8 [B,C,H,W], whose pixels are kept where bool [H,W] is true.
        watch: see `walk`; not called under "fixed_point".
    """
    refuse_steering(num_classes, known_classes, guidance_scale, mix_with)
    y = y.repeat_interleave(n_per_class)
    target = Conditioned(net, likelihood, y, num_classes, guidance_scale, mix_with, mix_weight)
    u = torch.stack([uniform(seed, n, tuple(image_shape)) for n in range(len(y))]).to(target.noise_device)
    canvas = torch.zeros(len(y), *image_shape, dtype=torch.uint8, device=y.device)

    def pick(logits: Tensor, c: int, i: Any = slice(None), j: Any = slice(None)) -> Tensor:
        drawn = inverse_cdf(sharpened(logits, temperature, top_k, top_p), u[:, c, i, j]).to(canvas)
        return drawn if image is None or known is None else torch.where(known[i, j], image[:, c, i, j], drawn)

    with evaluating(net, likelihood):
        if method == "fixed_point" or (method == "cached" and not hasattr(net, "step")):
            fixed_point(target, pick, canvas)
            return canvas
        return walk(target, pick, canvas, stepwise=method == "cached", watch=watch, progress=progress)


def refuse_steering(
    num_classes: int, known_classes: list[int], guidance_scale: float = 1.0, mix_with: int | None = None
) -> None:
    """Raise UserError where a model cannot be steered so."""
    if guidance_scale != 1 and (num_classes not in known_classes or len(known_classes) == 1):
        raise UserError(
            f"sampler.guidance_scale={guidance_scale}: wants a model that was trained with and without its class; "
            "train with label_dropout=0.1"
        )
    if mix_with is not None:
        require_known(f"sampler.mix_with={mix_with}", [mix_with], known_classes)
    if guidance_scale != 1 and mix_with is not None:
        raise UserError("sampler.guidance_scale and sampler.mix_with exclude each other; type one")


def require_known(setting: str, labels: list[int], known_classes: list[int]) -> None:
    """Raise UserError unless a `setting` asks for classes that the model was trained on."""
    if not labels or not set(labels) <= set(known_classes):
        raise UserError(f"{setting}: this model was trained on {', '.join(map(str, known_classes))}")


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
