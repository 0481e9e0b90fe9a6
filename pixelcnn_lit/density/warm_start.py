"""A warm start: a new density that begins with the trained weights of another, wherever they fit."""

from collections.abc import Iterable
from typing import Any

import torch

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density

OWN = ("model", "model_size", "likelihood")  # settings that the trained density brings


def parts_of(trained: Density, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the configs of its network and likelihood. Raises UserError where others are among the overrides."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] in OWN:
            raise UserError(f"{override}: init=... brings its own {', '.join(OWN)}; leave out one of the two")
    return {key: trained.settings[key] for key in ("model", "likelihood")}


@torch.no_grad()
def taken_over(density: Density, trained: Density) -> str:
    """Copy the weights of `trained` that have a counterpart of the same shape, and say in a line what was left out."""
    mine, theirs = density.state_dict(), trained.state_dict()
    left_out = [name for name in mine if name not in theirs or mine[name].shape != theirs[name].shape]
    for name in mine.keys() - left_out:
        mine[name].copy_(theirs[name])
    if left_out == list(mine):
        raise UserError("init: none of its weights fit this data; leave it out")
    count = f"{len(mine) - len(left_out)} of {len(mine)} tensors"
    return f"{count}; not {', '.join(left_out)}, which are of another shape" if left_out else count
