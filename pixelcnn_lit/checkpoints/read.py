"""Checkpoints read as data, and nothing else."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelcnn_lit.checkpoints.safetensors import read_weights
from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.runs.release import WRITTEN_BY, refuse_later
from pixelcnn_lit.runs.saved import checkpoint_file, damage


def read_checkpoint(path: str) -> dict[str, Any]:
    """The plain dict in a .ckpt or .safetensors file, with at least `hyper_parameters` and `state_dict`.

    Whatever else may stand for the file does: see `runs.saved.checkpoint_file`.

    Nothing in the file can run code, and a flipped bit is noticed: a .ckpt is a zip archive, whose checksums are
    verified first; a .safetensors file of `write_weights` holds the SHA-256 of its contents. Raises UserError.
    """
    path = str(checkpoint_file(path))
    try:
        content = read_weights(path) if path.endswith(".safetensors") else _read_archive(path)
    except UserError:
        raise
    except Exception as error:  # zip, pickle and safetensors name their troubles in a dozen classes
        raise UserError(
            f"ckpt={path}: damaged, or not a checkpoint of plain values ({first_line(error)}); type another ckpt"
        ) from error
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("hyper_parameters", "state_dict")]
    if isinstance(content, dict):
        refuse_later(content.get(WRITTEN_BY), f"ckpt={path}")
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"ckpt={path}: not a checkpoint of this program; type another ckpt")
    weights = [weight for weight in content["state_dict"].values() if isinstance(weight, Tensor)]
    if any(weight.layout != torch.strided for weight in weights):
        raise UserError(f"ckpt={path}: its weights are sparse, as none of this program are; type another ckpt")
    if sum(weight.nbytes for weight in weights) > Path(path).stat().st_size:
        raise UserError(f"ckpt={path}: its weights are larger than the file; type another ckpt")  # by strides of zero
    return content


def require_same(path: str, saved: dict[str, Any], present: dict[str, Any], setting: str = "ckpt") -> None:
    """Raise UserError unless the settings saved in checkpoint `path` are those at present, as far as given.

    `setting` is the one that names the checkpoint.
    """
    for key, value in present.items():
        if saved.get(key) != value:
            here = f"its {key} is {saved.get(key)}, here it is {value}"
            raise UserError(f"{setting}={path}: {here}; type the same, or another {setting}")


def _read_archive(path: str) -> Any:
    if wrong := damage(Path(path)):
        raise zipfile.BadZipFile(wrong)
    return torch.load(path, map_location="cpu", weights_only=True)
