"""The level of a pixel: the inverse of its cumulative distribution at its noise."""

import math

import torch
from torch import Tensor

from pixelcnn_lit.samplers.walk import Pick


def picker(
    u: Tensor,
    image: Tensor | None = None,
    known: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Pick:
    """Return a `Pick` that draws at the noise u float64 [B,C,H,W], but `image` where it is `known`, bool [H,W]."""
    noise = u.flatten(2)

    def pick(logits: Tensor, c: int, pixels: slice) -> Tensor:
        drawn = inverse_cdf(sharpened(logits, temperature, top_k, top_p), noise[:, c, pixels])
        if image is None or known is None:
            return drawn
        return torch.where(known.flatten()[pixels], image.flatten(2)[:, c, pixels], drawn.to(image))

    return pick


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
