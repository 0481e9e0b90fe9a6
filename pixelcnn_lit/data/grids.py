"""Grids of images to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FRAME = 2  # pixels between images
MIN_SIDE = 32  # smaller images are enlarged
GREY = 128


def grid(rows: Tensor, levels: int, names: Sequence[str] = ()) -> Tensor:
    """Return a picture of images in rows, the name of each before it: RGB uint8 [3,H',W'].

    Args:
        rows: levels [rows,columns,C,H,W].
        names: of the rows; none where there are none.
    """
    return tiled(as_rgb(rows, levels), names)


def as_rgb(images: Tensor, levels: int) -> Tensor:
    """Return levels [...,C,H,W] as they are shown: RGB uint8 [...,3,H,W].

    One channel is grey; of several, the first three are RGB. Codes, which are in no order, have colours that tell them
    apart; those of several channels have one together.
    """
    images = images.cpu()
    channels = images.shape[-3]
    if levels > 256:
        together = sum(31**c * images[..., c, :, :].long() for c in range(channels)) % levels
        return _colours(levels)[together].movedim(-1, -3)
    shown = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
    if channels == 1:
        return shown.expand(*shown.shape[:-3], 3, *shown.shape[-2:])
    none = torch.zeros_like(shown[..., :1, :, :])
    return torch.cat([shown, none], dim=-3)[..., :3, :, :]


def _colours(levels: int) -> Tensor:
    """A colour for each code, RGB uint8 [levels,3], far from those of the next: hues in golden angles."""
    hue = torch.arange(levels) * 0.618034 % 1
    value = 0.55 + 0.45 * (torch.arange(levels) * 0.754878 % 1)
    ramps = (6 * hue[:, None] + torch.tensor([0.0, 4.0, 2.0])) % 6
    return (255 * value[:, None] * ((ramps - 3).abs() - 1).clamp(0, 1)).round().to(torch.uint8)


def tiled(rows: Tensor, names: Sequence[str] = ()) -> Tensor:
    """Return RGB pictures uint8 [rows,columns,3,H,W] as one: see `grid`."""
    n_rows, n_columns = rows.shape[:2]
    factor = -(-MIN_SIDE // min(rows.shape[-2:]))
    shown = rows.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    height, width = (side + FRAME for side in shown.shape[-2:])
    picture = torch.full((3, n_rows * height + FRAME, n_columns * width + FRAME), GREY, dtype=torch.uint8)
    for row in range(n_rows):
        for column in range(n_columns):
            top, left = row * height + FRAME, column * width + FRAME
            picture[:, top : top + height - FRAME, left : left + width - FRAME] = shown[row, column]
    return torch.cat([_margin(names, height, len(picture[0])), picture], dim=2) if names else picture


def _margin(names: Sequence[str], height: int, total: int) -> Tensor:
    """Return the names of rows of so many pixels, one below the other: RGB uint8 [3,total,W]."""
    font = ImageFont.load_default(size=12)
    width = round(max(font.getlength(name) for name in names)) + 3 * FRAME
    margin = Image.new("RGB", (width, total), (GREY,) * 3)
    draw = ImageDraw.Draw(margin)
    for row, name in enumerate(names):
        draw.text((width - FRAME, row * height + height // 2), name, fill="white", font=font, anchor="rm")
    return torch.from_numpy(np.asarray(margin).copy()).permute(2, 0, 1)


def heat(bits: Tensor, most: float) -> Tensor:
    """Return where bits are spent as pictures, from black for none over red and yellow to white for `most`.

    Args:
        bits: [...,H,W], as of `Density.bits_per_pixel`.
        most: for pictures that compare, the same in all: `Density.uniform_bits`, for example.

    Returns:
        RGB uint8 [...,3,H,W].
    """
    share = 3 * bits.cpu().clamp_min(0) / most
    ramps = torch.stack([share, share - 1, share - 2], dim=-3)  # red is full before green begins, then blue
    return (255 * ramps.clamp(0, 1)).round().to(torch.uint8)


def save(picture: Tensor, path: Path) -> None:
    """Write an RGB picture uint8 [3,H,W] as PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def animate(pictures: list[Tensor], path: Path) -> None:
    """Write RGB pictures uint8 [3,H,W] as an endless GIF of some five seconds, the last one held for two."""
    frames = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    durations = [5000 // len(frames)] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
