"""Sampling as a function of noise: the same seed gives the same image, whatever the batch or the device."""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pixelcnn_lit.build import Range
from pixelcnn_lit.noise import uniform

Pick = Callable[[Tensor, int, int, int], Tensor]


@torch.no_grad()
def walk(net: nn.Module, likelihood: Any, y: Tensor, pick: Pick, canvas: Tensor, progress: bool = False) -> Tensor:
    """Go through the pixels in raster order and fill `canvas` uint8 [B,C,H,W] in place.

    `pick(logits [B,V], c, i, j)` returns the level, int64 [B], of channel c at row i, column j. The network runs once
    a pixel, on the rows so far; it is in eval mode meanwhile.
    """
    _, channels, height, width = canvas.shape
    modes = [(module, module.training) for module in (net, likelihood)]
    for module, _ in modes:
        module.eval()
    for p in tqdm(range(height * width), "pixels", disable=not progress, leave=False):
        i, j = divmod(p, width)
        features = net(canvas[:, :, : i + 1], y)[:, :, i, j]
        for c in range(channels):
            logits = likelihood.channel_logits(features, canvas[:, :, i, j], c)
            canvas[:, c, i, j] = pick(logits, c, i, j).to(torch.uint8)
    for module, mode in modes:
        module.train(mode)
    return canvas


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The level [B] at which the cumulative distribution of logits [B,V] passes u [B], in float64."""
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    cdf = logits.double().softmax(1).cumsum(1)
    return (cdf[:, :-1] <= u[:, None].to(cdf.device)).sum(1)


def naive(
    net: nn.Module,
    likelihood: Any,
    y: Tensor,
    image_shape: tuple[int, int, int],
    *,
    n_per_class: Annotated[int, Range(1)] = 1,
    seed: Annotated[int, Range(0)] = 0,
    temperature: Annotated[float, Range(0.001)] = 1.0,
    progress: bool = False,
) -> Tensor:
    """`n_per_class` images of each class in y int64 [K] in turn: uint8 [B=K*n_per_class,C,H,W].

    The plain way: one evaluation of the network a pixel, on the rows so far.
    Image n is a function of (seed, n): u ~ U[0,1)^[C,H,W], and each value is the inverse CDF of its u.
    `temperature` divides the logits; 1 samples the model itself.
    """
    y = y.repeat_interleave(n_per_class)
    u = torch.stack([uniform(seed, n, tuple(image_shape)) for n in range(len(y))])
    canvas = torch.zeros(len(y), *image_shape, dtype=torch.uint8, device=y.device)
    return walk(
        net, likelihood, y, lambda logits, c, i, j: inverse_cdf(logits / temperature, u[:, c, i, j]), canvas, progress
    )
