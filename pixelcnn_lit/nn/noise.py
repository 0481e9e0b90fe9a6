"""The randomness of an image, as a function of a few numbers alone."""

import numpy as np
import torch
from torch import Tensor


def uniform(key: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Uniform float64 noise of the image that `key`, numbers >= 0, names: the same on every device, in every batch."""
    return torch.from_numpy(np.random.default_rng(key).random(shape))
