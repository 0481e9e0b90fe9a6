"""Images scored by an even mixture of a density and of the same of their mirror images."""

from typing import NamedTuple

import torch

from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.bayes import even_mixture
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.runs.terminal import progress


class FlipMixture(NamedTuple):
    """Bits per dimension of images by the mixture, and how many fewer these are than by the density itself.

    The standard error is that of the difference, image by image; None of one image.
    """

    flip_mixture_bpd: float
    flip_mixture_gain: float
    flip_mixture_gain_standard_error: float | None


def score_flip_mixture(model: Density, images: Split, batch_size: int) -> FlipMixture:
    """Score images as `Density.nats` does with `flip_mixture`, and without."""
    plain, mixed = [], []
    for part in progress(images.parts(batch_size), desc="mirrored"):
        x = part.x
        as_it_is, mirrored = (model.nats(each, part.y).double().cpu() for each in (x, x.flip(-1)))
        plain.append(as_it_is)
        mixed.append(even_mixture(as_it_is, mirrored))
    bpd = bits(torch.cat(mixed)) / model.dims
    gain = bits(torch.cat(plain)) / model.dims - bpd
    error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else None
    return FlipMixture(float(bpd.mean()), float(gain.mean()), error)
