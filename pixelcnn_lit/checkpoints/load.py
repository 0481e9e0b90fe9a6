"""A module from a checkpoint alone."""

import io
from typing import Any

import torch
from torch import Tensor

from pixelcnn_lit.checkpoints.budget import MemoryBudget
from pixelcnn_lit.checkpoints.int8 import restored
from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.config.errors import UserError, first_line


def rebuild(path: str, kind: Any, **changed: Any) -> Any:
    """The model of a .ckpt or .safetensors file, from the file alone, in eval mode on the CPU.

    Nothing in the file can run code: its values are plain, its targets as `build` allows them. Raises UserError.

    Args:
        kind: a LightningModule class whose arguments are the file's `hyper_parameters`, with what is `changed` in them.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"] | changed
    if not settings.keys() >= set(kind.IDENTITY):
        raise UserError(f"ckpt={path}: not a checkpoint of this program's {kind.TITLE}s; type another")
    try:
        model = _built(kind, settings, restored(checkpoint["state_dict"]))
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's values lead to
        raise UserError(f"ckpt={path}: not a checkpoint of this program ({first_line(error)})") from error
    if not all(bool(values.isfinite().all()) for values in model.state_dict().values() if isinstance(values, Tensor)):
        raise UserError(f"ckpt={path}: some of its weights are not finite; type another ckpt")
    return model.eval()


def _built(kind: Any, settings: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A module of its settings, with its weights. Settings that ask for far more memory than these do not get it."""
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    held = sum(weight.nbytes for weight in tensors)
    with MemoryBudget(8 * held + 2**29):  # networks take three times their weights to start; masks may be large
        module = kind(**settings)
    if any(weight.dtype == torch.float64 for weight in tensors):
        module.double()
    module.load_state_dict(weights)
    return module


def require_loadable(module: Any) -> None:
    """Raise UserError unless a checkpoint of `module` could be loaded: before it is trained, and not afterwards."""
    file = io.BytesIO()
    try:
        torch.save(dict(module.hparams), file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):
            _built(type(module), torch.load(file, weights_only=True), module.state_dict())
    except Exception as error:  # whatever its constructor leads to
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"{module.IDENTITY[0]}: cannot be built again from its settings, and so no checkpoint of it loaded "
            f"({cause}); its constructor must make the same of the same plain values"
        ) from error
