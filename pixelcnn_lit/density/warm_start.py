"""A warm start: a new density that begins with the trained weights of another, wherever they fit."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density

OWN = ("model", "model_size", "likelihood")  # settings that the trained density brings


def parts_of(trained: Density, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the configs of its network and likelihood. Raises UserError where others are among the overrides."""
    refuse_own(overrides, "init")
    return {key: trained.settings[key] for key in ("model", "likelihood")}


def refuse_own(overrides: Iterable[str], setting: str, also: Sequence[str] = ()) -> None:
    """Raise UserError where an override is of what a trained density brings, or `also`; `setting` names its file."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] in (*OWN, *also):
            raise UserError(
                f"{override}: {setting}=... already determines the model and the likelihood; leave out one of the two"
            )


@torch.no_grad()
def taken_over(density: Density, trained: Density) -> str:
    """Copy the weights of each module of `trained` whose shapes all fit, and say in a line what was left out.

    Raises UserError where nothing fits.
    """
    mine, theirs = _by_module(density), _by_module(trained)
    fit = [name for name, own in mine.items() if _shapes(own) == _shapes(theirs.get(name, {}))]
    if not fit:
        raise UserError("init: none of its weights fit this data; leave it out")
    for module in fit:
        for name, weight in mine[module].items():
            weight.copy_(theirs[module][name])
    left_out = [name for name in mine if name not in fit]
    count = f"weights of {len(fit)} of {len(mine)} modules"
    return f"{count}; as they are drawn, since their shapes differ: {', '.join(left_out)}" if left_out else count


def _by_module(density: Density) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each module, those of its parametrizations among them."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in density.state_dict().items():
        module = name.partition(".parametrizations")[0] if ".parametrizations" in name else name.rpartition(".")[0]
        found.setdefault(module, {})[name] = weight
    return found


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
