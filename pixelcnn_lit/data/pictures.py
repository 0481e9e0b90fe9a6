"""Pictures, from files and to look at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pixelcnn_lit.config.errors import UserError

GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P")  # Pillow's modes of 8 bits and less


def read_png(file: Path) -> Tensor:
    """uint8 [C,H,W]: one channel of grey files, with or without transparency, three of colour. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with Image.open(file) as image:
            if image.mode not in GREY + COLOUR:
                raise UserError(f"{file}: pixels of mode {image.mode}; save it with 8 bits a channel")
            pixels = np.asarray(image.convert("L" if image.mode in GREY else "RGB")).copy()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable PNG; replace or delete it") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def grid(rows: Tensor, levels: int, min_side: int = 32, frame: int = 2) -> Tensor:
    """uint8 [rows,columns,C,H,W] of so many levels to an RGB picture uint8 [3,H',W'], small images enlarged."""
    shown = (rows.flatten(0, 1).cpu().float() * (255 / (levels - 1))).round().to(torch.uint8)
    factor = -(-min_side // min(shown.shape[-2:]))
    shown = shown.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    height, width = (side + frame for side in shown.shape[-2:])
    picture = torch.full((3, rows.shape[0] * height + frame, rows.shape[1] * width + frame), 128, dtype=torch.uint8)
    for n, image in enumerate(shown):
        top, left = n // rows.shape[1] * height + frame, n % rows.shape[1] * width + frame
        picture[:, top : top + height - frame, left : left + width - frame] = image
    return picture


def save(picture: Tensor, path: Path) -> None:
    """Write an RGB picture uint8 [3,H,W] as PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def animate(pictures: list[Tensor], path: Path) -> None:
    """Write RGB pictures uint8 [3,H,W] as an endless GIF of some five seconds, the last one held for two."""
    frames = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    durations = [5000 // len(frames)] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def to_pil(image: Tensor) -> Image.Image:
    """An image uint8 [1 or 3,H,W], grey or RGB, its levels unchanged."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
