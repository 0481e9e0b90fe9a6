"""What networks of several resolutions share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESOLUTIONS = 3


def dealt(n_residual: int, resolution: int) -> tuple[int, int]:
    """Return how many of so many blocks the down and the up pass have at a resolution, 0 the finest."""
    up, down = ((n_residual - 1 - k) // (2 * RESOLUTIONS) + 1 for k in (2 * resolution, 2 * resolution + 1))
    return down, up


class Upsampling(nn.ConvTranspose2d):
    """A transposed convolution of stride 2: fine (i, j) reads coarse (i//2, j//2), with width 3 also (i//2, (j+1)//2).

    [B,C,H,W] -> [B,C,2H,2W]. It starts at zero: at first the coarser resolutions add nothing.
    """

    def __init__(self, channels: int, width: int) -> None:
        side = width - 2
        super().__init__(channels, channels, (2, width), stride=2, padding=(0, side), output_padding=(0, side))
        assert self.bias is not None
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """Return the weight, of width 2, as a matrix: from a coarse pixel to the four that read it, [C,2*2*C]."""
        return self.weight.permute(0, 2, 3, 1).flatten(1).contiguous()

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [⌈H/2⌉,⌈W/2⌉], that the outputs in `seen`, bool [H,W], are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.pad(seen.to(ones)[None, None], (0, 1, 0, 1))
        read = F.conv2d(padded, ones, stride=2, padding=self.padding)
        return read[0, 0, :, : (seen.shape[1] + 1) // 2] > 0
