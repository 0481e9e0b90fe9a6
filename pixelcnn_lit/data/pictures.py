"""People's pictures as levels, and back."""

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


def to_pil(image: Tensor) -> Image.Image:
    """An image uint8 [1 or 3,H,W], grey or RGB, its levels unchanged."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
