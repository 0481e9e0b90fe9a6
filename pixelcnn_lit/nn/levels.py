"""The levels of a pixel, and its channels."""

import torch

MOST_CHANNELS = 64


def level_dtype(levels: int) -> torch.dtype:
    """Return the type of images of so many levels: torch lacks much for uint16."""
    return torch.uint8 if levels <= 256 else torch.int32
