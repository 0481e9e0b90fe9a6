"""Changes of images [B,C,H,W]: the same ones whenever they are read, or anew in each batch.

The former are told the images' positions in their split, `at`, int64 [B].
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pixelcnn_lit.nn.noise import uniform


def resize(x: Tensor, at: Tensor, size: int) -> Tensor:
    """The shorter side scaled to `size` (bilinear, antialiased): other pixels, another dataset."""
    return F.resize(x, [size], antialias=True)


def pad(x: Tensor, at: Tensor, width: int) -> Tensor:
    """`width` black pixels on each side."""
    return torch.nn.functional.pad(x, (width,) * 4)


def requantize(x: Tensor, at: Tensor, old: int, new: int) -> Tensor:
    return requantize_levels(x, old, new)


def requantize_levels(x: Tensor, old: int, new: int) -> Tensor:
    """Levels 0..old-1 to 0..new-1 in bins of equal width, in integers. With `new=2`: the threshold at half."""
    return (x.int() * new).div(old, rounding_mode="floor").to(torch.uint8)


def binarize_by_index(x: Tensor, at: Tensor, levels: int, seed: int) -> Tensor:
    """Draw each pixel white with probability x / (levels - 1); image n's draw is a function of (seed, n)."""
    binary = torch.empty_like(x)
    for image, n, into in zip(x, at.tolist(), binary, strict=True):
        into[:] = uniform((seed, n), tuple(image.shape)) < image / (levels - 1)
    return binary


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [B,C,H,W] left to right with probability one half."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def crop(x: Tensor, generator: torch.Generator, margin: int) -> Tensor:
    """Shift each image [B,C,H,W] by up to `margin` pixels each way; black comes in at the edges."""
    b, _, h, w = x.shape
    padded = torch.nn.functional.pad(x, (margin,) * 4)
    down, right = torch.randint(2 * margin + 1, (2, b), generator=generator)
    rows = down[:, None] + torch.arange(h)
    columns = right[:, None] + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pose(x: Tensor, y: Tensor, generator: torch.Generator, poses: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Put each image [B,C,H,W] into one of its poses, and its class y [B] to class + num_classes pose, which tells it.

    Pose 0 is as it was; an odd one is mirrored left to right; from 2 on it is turned by pose // 2 quarters, too.
    """
    drawn = torch.randint(poses, y.shape, generator=generator)
    x = x.clone()
    for one in range(1, poses):
        chosen = drawn == one
        upright = x[chosen]
        x[chosen] = torch.rot90(upright.flip(-1) if one % 2 else upright, one // 2, (-2, -1))
    return x, y + num_classes * drawn


def binarize(x: Tensor, generator: torch.Generator, levels: int) -> Tensor:
    """Draw each pixel white with probability x / (levels - 1), anew each time (dynamic binarization)."""
    return (torch.rand(x.shape, generator=generator) < x / (levels - 1)).to(torch.uint8)
