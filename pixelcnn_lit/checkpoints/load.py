"""A module from a checkpoint alone."""

import io
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from pixelcnn_lit.checkpoints.budget import MemoryBudget
from pixelcnn_lit.checkpoints.int8 import dequantize
from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.config.build import check_values
from pixelcnn_lit.config.errors import UserError, first_line


def load_module(path: str, kind: Any, prefix: str = "", without: Collection[str] = ()) -> Any:
    """Return the module of a .ckpt or .safetensors file, from the file alone, in eval mode on the CPU.

    Nothing in the file can run code: its values are plain, its targets as `build` allows them. Raises UserError.

    Args:
        kind: the class, with TITLE and IDENTITY, whose arguments are the file's `hyper_parameters`.
        prefix: of the names of its weights in the checkpoint of a run, where a LightningModule holds it.
        without: the hyper-parameters that are none of its arguments.
    """
    checkpoint = read_checkpoint(path)
    settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if key not in without}
    if not settings.keys() >= set(kind.IDENTITY):
        raise UserError(f"ckpt={path}: not a checkpoint of this program's {kind.TITLE}s; type another")
    weights = {str(name).removeprefix(prefix): weight for name, weight in checkpoint["state_dict"].items()}
    try:
        check_values("", kind, settings)
    except UserError as error:
        raise UserError(f"ckpt={path}: {error}") from None
    try:
        module = _built(kind, settings, dequantize(weights))
    except UserError:
        raise
    except Exception as error:  # whatever untrusted values lead to
        raise UserError(f"ckpt={path}: not a checkpoint of this program ({first_line(error)})") from error
    if not all(bool(values.isfinite().all()) for values in module.state_dict().values() if isinstance(values, Tensor)):
        raise UserError(f"ckpt={path}: some of its weights are not finite; type another ckpt")
    return module.eval()


def _built(kind: Callable[..., nn.Module], settings: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """A module of its settings, with its weights. Settings that ask for far more memory than these do not get it."""
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    held = sum(weight.nbytes for weight in tensors)
    with MemoryBudget(8 * held + 2**29):  # networks take three times their weights to start; masks may be large
        module = kind(**settings)
    if any(weight.dtype == torch.float64 for weight in tensors):
        module.double()
    module.load_state_dict(weights)
    return module


def require_loadable(module: Any, settings: dict[str, Any]) -> None:
    """Raise UserError unless a checkpoint of a module made of `settings` could be loaded: before it is trained."""
    file = io.BytesIO()
    try:
        torch.save(settings, file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):
            _built(type(module), torch.load(file, weights_only=True), module.state_dict())
    except Exception as error:  # whatever its constructor leads to
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"{module.IDENTITY[0]}: cannot be built again from its settings, and so no checkpoint of it loaded "
            f"({cause}); its constructor must make the same of the same plain values"
        ) from error
