"""A mixture of discretised logistics."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

# [pixels,K,V] is large for a whole map; so many pixels at a time stay in the processor's caches.
PIXELS = 512


class Mixture(NamedTuple):
    """The parameters of pixels, as tensors [B,...,K]: pi_k as logits, the others by channel or pair of channels."""

    log_weight: Tensor
    means: tuple[Tensor, ...]
    log_scales: tuple[Tensor, ...]
    slopes: dict[tuple[int, int], Tensor]


class LogisticMixture(nn.Module):
    """A mixture of K discretised logistics: p(x) = sum_k pi_k prod_c P(x_c | mean_ck, scale_ck).

    P(v) is the mass that a logistic has between the edges of level v's bin, where the first bin reaches down to
    -infinity and the last up to +infinity. The mean of channel c is linear in the channels before it:
    mean_ck + sum_{b<c} a_bck x_b, all on the scale on which levels are [-1, 1]. The weights pi_k belong to the pixel
    and not to a channel, so p(x_c | x_<c) is again a mixture, in which component k counts as much as it explains x_<c.
    Salimans et al. 2017, PixelCNN++ (arXiv 1701.05517), equations 1 to 3. What differs: every mass is exact, and not a
    density times a width where it is small, so they sum to 1; features of zero are components spread over the greys.
    a_bck is the tanh of a feature, as published: in bf16 it is then finest near 1, where "as much as red" lies.

    Args:
        image_shape, levels: facts of the data.
        n_mixtures: K.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], levels: int, n_mixtures: Annotated[int, Interval(ge=1, le=1000)] = 10
    ) -> None:
        super().__init__()
        self.channels, self.levels, self.n_mixtures = image_shape[0], levels, n_mixtures
        self.pairs = list(combinations(range(self.channels), 2))
        self.groups = 1 + 2 * self.channels + len(self.pairs)  # of K features: weights, means, log-scales, coefficients
        self.out_channels = self.groups * n_mixtures
        # As published, -7 at 256 levels: a bin is at most 8.6 scales wide, and holds at most 0.97 of a logistic. Below
        # it nothing is gained, and gradients, which go with 1/scale, blow up. Above the ceiling masses underflow.
        self.floor, self.ceiling = math.log(2 / (levels - 1)) - 2.15, 5.0
        self.start = self._start()

    def channel_logits(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """log p(x_c | x_<c, earlier pixels), normalised: features [B,D,...], x [B,C,...] -> [B,V,...], >= float32."""
        mixture = self._mixture(features)
        joint = mixture.log_weight  # log pi_k p_k(x_<c), [B,...,K]
        for b in range(c):
            joint = joint + self._log_mass(mixture, x, b)
        mean, log_scale = self._logistic(mixture, x, c)
        parts = [part.flatten(0, -2).split(PIXELS) for part in (joint.log_softmax(-1), mean, log_scale)]
        logits = torch.cat([self._every_level(*some) for some in zip(*parts, strict=True)])  # [pixels,V]
        return logits.unflatten(0, joint.shape[:-1]).movedim(-1, 1)

    def log_prob(self, features: Tensor, x: Tensor) -> Tensor:
        """Nats of each value: features [B,D,H,W], x uint8 [B,C,H,W] -> [B,C,H,W]."""
        mixture = self._mixture(features)
        joint = [mixture.log_weight]  # log pi_k p_k(x_<c) of every c, up to the constant that the first one sums to
        for c in range(self.channels):
            joint.append(joint[-1] + self._log_mass(mixture, x, c))
        totals = torch.stack([each.logsumexp(-1) for each in joint], dim=1)
        return totals[:, 1:] - totals[:, :-1]

    def _mixture(self, features: Tensor) -> Mixture:
        """Features [B,D,...] as what they mean, which channels-last memory has side by side."""
        h = features.movedim(1, -1).unflatten(-1, (self.groups, self.n_mixtures))
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        groups = (h + self.start.to(h)).unbind(-2)
        n = self.channels
        slopes = dict(zip(self.pairs, groups[1 + 2 * n :], strict=True))
        return Mixture(groups[0], groups[1 : 1 + n], groups[1 + n : 1 + 2 * n], slopes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move the start with the rest, and cast it with nothing: rounded, it would be that of another model."""
        self.start = self.start.to(fn(self.start).device)
        return super()._apply(fn, recurse)

    def _start(self) -> Tensor:
        """The groups of features that are zero, [D/K,K]: equal weights, means in a row, scales that just overlap."""
        start = torch.zeros(self.groups, self.n_mixtures)
        last = 1 - 1 / self.n_mixtures
        means, log_scales = start[1 : 1 + 2 * self.channels].chunk(2)
        means.copy_(torch.linspace(-last, last, self.n_mixtures))
        log_scales.fill_(math.log(max(1 / (self.n_mixtures + 1), 1 / (self.levels - 1))))
        return start

    def _logistic(self, mixture: Mixture, x: Tensor, c: int) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of channel c given the channels before it, [B,...,K]."""
        mean = mixture.means[c]
        for b in range(c):
            slope = mixture.slopes[b, c].tanh()
            mean = torch.addcmul(mean, slope, self._centre(x[:, b, ..., None].to(mean.dtype)))
        return mean, mixture.log_scales[c].clamp(self.floor, self.ceiling)

    def _centre(self, level: Tensor) -> Tensor:
        return level * (2 / (self.levels - 1)) - 1

    def _log_mass(self, mixture: Mixture, x: Tensor, c: int) -> Tensor:
        """log P(x_c) of each component, [B,...,K].

        For s the logistic function, s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)): none of the three cancels or vanishes.
        """
        mean, log_scale = self._logistic(mixture, x, c)
        level = x[:, c, ..., None]
        has_lower, has_upper = (level > 0).to(mean.dtype), (level < self.levels - 1).to(mean.dtype)
        per_scale = log_scale.neg().exp()
        centre = (self._centre(level.to(mean.dtype)) - mean) * per_scale
        half = per_scale / (self.levels - 1)
        upper, lower = F.logsigmoid(centre + half) * has_upper, F.logsigmoid(half - centre) * has_lower
        return upper + lower + torch.log(-torch.expm1(-2 * half)) * (has_lower * has_upper)

    def _every_level(self, log_weight: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """log sum_k weight_k P_k(v) for all v: three of [N,K] -> [N,V]. A bin's upper edge is the next one's lower."""
        per_scale = log_scale.neg().exp()
        edges = self._centre(torch.arange(self.levels - 1, dtype=mean.dtype, device=mean.device) + 0.5)
        edges = (edges - mean[..., None]) * per_scale[..., None]  # [N,K,V-1]
        # log s(e) and logsumexp take a fraction of the time so. What exp makes of numbers below -80 adds nothing to 1.
        below = edges.clamp_max(0) - (1 + (-edges.abs()).clamp_min(-80).exp()).log()
        mass = F.pad(below, (0, 1))
        mass[..., 1:] += below - edges  # log s(-e) = log s(e) - e
        mass[..., 1:-1] += torch.log(-torch.expm1(-2 * per_scale / (self.levels - 1)))[..., None]
        mass += log_weight[..., None]
        largest = mass.amax(-2, keepdim=True)
        return (mass - largest).clamp_min(-80).exp().sum(-2).log() + largest[..., 0, :]
