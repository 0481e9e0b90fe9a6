"""A density in two lines: how large it is, what it costs, what it sees."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixelcnn_lit.density.density import Density
from pixelcnn_lit.samplers.walk import eval_mode


def summary(density: Density) -> str:
    """Return its parameters, the cost of a forward pass, and the receptive field of the pixel in the middle."""
    name = type(density.network).__name__
    parameters = sum(p.numel() for p in density.parameters())
    _, height, width = density.image_shape
    i, j = height // 2, width // 2
    seen = int(density.network.receptive_field(i, j).sum())
    return (
        f"{name}: {parameters:,} parameters, {flops(density) / 1e9:.3g} GFLOP an image\n"
        f"receptive field of the centre pixel: {seen} of the {i * width + j} earlier pixels"
    )


@torch.no_grad()
def flops(density: Density) -> int:
    """Return the operations of a forward pass over one image, of dense kernels."""
    x = torch.zeros(1, *density.image_shape, dtype=torch.uint8, device=density.device)
    y = torch.tensor(density.classes[:1], device=density.device)
    with eval_mode(density), FlopCounterMode(display=False) as counter:
        density(x, y)
    return counter.get_total_flops()
