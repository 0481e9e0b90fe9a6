"""Weights rounded for a file to give away, and read back from it."""

import torch
from torch import Tensor

from pixelcnn_lit.errors import UserError

SCALE = "/scale"  # how the name of the scales ends that belong to a matrix in int8


def rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights as `dtype`: "float32" as they are, "float16", or "int8".

    In int8 is what has more than one dimension: in each row, of a convolution the kernels of an output, the weight
    furthest from zero becomes ±127, and its 127th part is the scale that stands beside the matrix. Zeros stay zeros.
    The rest stays as it is. UserError where a value is too large for float16.
    """
    if dtype == "float32":
        return weights
    result = {}
    for name, weight in weights.items():
        if dtype == "float16":
            result[name] = weight.half() if weight.is_floating_point() else weight
            if not bool(result[name].isfinite().all()):
                raise UserError(f"dtype=float16: some values of {name} are too large for it; type dtype=float32")
        elif weight.is_floating_point() and weight.ndim > 1:
            scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
            result[name] = (weight / scale.clamp_min(1e-30)).round().to(torch.int8)
            result[name + SCALE] = scale
        else:
            result[name] = weight
    return result


def restored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in int8 times their scales; what else there is, as it is."""
    result = {}
    for name, weight in weights.items():
        if name + SCALE in weights:
            rows = len(weight), *(1,) * (weight.ndim - 1)
            result[name] = weight * weights[name + SCALE].expand(rows)  # no stranger's scale makes it any larger
        elif not name.endswith(SCALE):
            result[name] = weight
    return result
