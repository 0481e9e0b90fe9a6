"""The randomness of an image, as a function of a seed and the image's number alone."""

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float64 noise of image `number`: the same on every device and in every batch."""
    return torch.from_numpy(np.random.default_rng([seed, number]).random(shape))
