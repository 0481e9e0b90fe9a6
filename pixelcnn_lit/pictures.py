"""Images as one picture to look at."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def grid(images: Tensor, levels: int, per_row: int, min_side: int = 32) -> Tensor:
    """uint8 [N,C,H,W] of so many levels to one RGB picture uint8 [3,H',W'], small images enlarged whole pixels."""
    shown = (images.cpu().float() * (255 / (levels - 1))).round().to(torch.uint8)
    factor = -(-min_side // min(shown.shape[-2:]))
    shown = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return make_grid(shown, nrow=per_row, padding=2, pad_value=128)


def save(picture: Tensor, path: Path) -> None:
    """Write an RGB picture uint8 [3,H,W] as PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
