"""A density from a checkpoint alone, without Lightning."""

import torch

from pixelcnn_lit.checkpoints.load import load_module
from pixelcnn_lit.density.density import Density

# The settings that a checkpoint of a run holds beside those of its density.
TRAINING = ("optimizer", "scheduler", "channels_last", "gradient_checkpointing", "compile")


def load(ckpt: str) -> Density:
    """Return the model of a .ckpt, a .safetensors, a run's directory or shipped weights, in eval mode on the CPU.

    Move it as any module: `load("mnist").to("cuda")`. Raises UserError: see `load_module`.
    """
    density: Density = load_module(ckpt, Density, prefix="density.", without=TRAINING)
    return density.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
