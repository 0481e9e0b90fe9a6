"""Weights quantized for a file to share, and read back from it."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from pixelcnn_lit.config.errors import UserError

SCALE = "/scale"  # how the name of the scales ends that belong to a matrix in int8


def hidden_matrices(network: nn.Module, width: int | None) -> set[str]:
    """Return the names of the weights of a network's hidden layers: from multiples of `width` channels to multiples.

    The first and the last layers are none of these, nor are tables. Raises UserError where there is no `width`.
    """
    if not width:
        raise UserError("dtype=int8: this network has no hidden_channels; type dtype=float16")
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if not isinstance(layer, nn.Embedding)}
    matrices = {name: weight for name, weight in network.named_parameters() if name in layers and weight.ndim > 1}
    return {name for name, weight in matrices.items() if not any(channels % width for channels in weight.shape[:2])}


def quantize(
    weights: dict[str, Tensor], dtype: Literal["float32", "float16", "int8"], hidden: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return weights as they are, in float16, or in float16 with the `hidden` ones in int8.

    What is furthest from zero in each slice of a hidden matrix along its first dimension becomes ±127, and its 127th
    part is the scale, in float32 beside the matrix. To `ckpt=cifar10` that costs 0.002 bits per dimension, and 0.05 if
    its first and last layers are in int8, too. Raises UserError where a value is too large for float16.
    """
    if dtype == "float32":
        return weights
    result = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    for name, weight in result.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"dtype={dtype}: some values of {name} are too large for float16; type dtype=float32")
    if dtype == "float16":
        return result
    for name in hidden:
        weight = weights[name]
        scale = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
        nonzero = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        result[name] = (weight / nonzero).round().to(torch.int8)
        result[name + SCALE] = scale
    return result


def dequantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each matrix in int8 times its scales; what else there is, as it is. ValueError where these do not fit."""
    result = dict(weights)
    for name, weight in weights.items():
        if name + SCALE in weights:
            scale = result.pop(name + SCALE)
            fits = len(weight), *(1,) * (weight.ndim - 1)
            if (weight.dtype, scale.dtype, scale.shape) != (torch.int8, torch.float32, fits):  # or it might grow
                raise ValueError(f"the scales of {name} are none of a matrix in int8")
            result[name] = weight * scale
    return result
