"""Weights to share, as any program can read them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.atomic import atomic_write
from pixelcnn_lit.runs.release import RELEASE, WRITTEN_BY


def write_weights(path: Path, weights: dict[str, Tensor], hyper_parameters: dict[str, Any]) -> None:
    """Weights and what rebuilds their model as safetensors, which any program can read, and `load` by its name."""
    if path.suffix != ".safetensors":
        raise UserError(f"out={path}: type a name that ends in .safetensors")
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    config = json.dumps(hyper_parameters)
    metadata = {"format": "pt", "hyper_parameters": config, "sha256": digest(weights, config), WRITTEN_BY: RELEASE}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(weights, metadata))


def read_weights(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    if not {"hyper_parameters", "sha256"} <= metadata.keys():
        raise UserError(f"ckpt={path}: not written by pixelcnn_lit.export; type another ckpt")
    if digest(weights, metadata["hyper_parameters"]) != metadata["sha256"]:
        raise ValueError("its SHA-256 is not the one written in it")
    settings = json.loads(metadata["hyper_parameters"])
    return {"hyper_parameters": settings, "state_dict": weights, WRITTEN_BY: metadata.get(WRITTEN_BY)}


def digest(weights: dict[str, Tensor], config: str) -> str:
    """SHA-256 of the config and of each weight's name, type, shape and bytes."""
    hashed = hashlib.sha256(config.encode())
    for name, weight in sorted(weights.items()):
        hashed.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        hashed.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
