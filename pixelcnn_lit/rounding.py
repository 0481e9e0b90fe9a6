"""Weights rounded for a file to give away, and read back from it."""

import copy
from typing import Literal

import torch
from torch import Tensor

from pixelcnn_lit.errors import UserError

SCALE = "/scale"  # how the name of the scales ends that belong to a matrix in int8


def rounded(weights: dict[str, Tensor], dtype: Literal["float32", "float16", "int8"], width: int) -> dict[str, Tensor]:
    """The weights as they are, in float16, or in float16 with int8 where channels of a hidden layer enter and leave.

    Those matrices are known by their first two dimensions, which are multiples of `width`. What is furthest from zero
    in each slice along the first becomes ±127, and its 127th part is the scale, in float32 beside the matrix. Where
    pixels enter and features leave, int8 would cost many times the bits that it costs in all hidden layers together.
    UserError where a value is too large for float16.
    """
    if dtype == "float32":
        return weights
    result = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    for name, weight in result.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"dtype={dtype}: some values of {name} are too large for float16; type dtype=float32")
    for name, weight in weights.items() if dtype == "int8" else ():
        if weight.is_floating_point() and weight.ndim > 1 and not any(side % width for side in weight.shape[:2]):
            scale = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
            nonzero = scale.clamp_min(torch.finfo(scale.dtype).tiny)
            result[name], result[name + SCALE] = (weight / nonzero).round().to(torch.int8), scale
    return result


def restored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix in int8 times its scales; what else there is, as it is. ValueError where these do not fit."""
    result = copy.copy(weights)  # with what torch keeps beside an OrderedDict
    for name, weight in weights.items():
        if name + SCALE in weights:
            scale = result.pop(name + SCALE)
            fits = len(weight), *(1,) * (weight.ndim - 1)
            if (weight.dtype, scale.dtype, scale.shape) != (torch.int8, torch.float32, fits):  # or it might grow
                raise ValueError(f"the scales of {name} are none of a matrix in int8")
            result[name] = weight * scale
    return result
