"""A softmax over the levels of each channel."""

from itertools import combinations
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pixelcnn_lit.nn.ordinal import OrdinalRows


class Categorical(nn.Module):
    """A V-way softmax per channel: p(x) = prod_c p(x_c | x_<c, features).

    `colour="independent"` is the published baseline, p(x_c | features): V logits a channel straight from the network.
    `colour="autoregressive"` lets each channel see the ones before it at its pixel through a small head,
    logits_c = W_c relu(features_c + sum_{b<c} table_bc[x_b]); the network still runs once a pixel. The factorisation
    is van den Oord et al. 2016 (arXiv 1601.06759), equation 2; the head is ours. One channel has no colour, and then
    both are the same softmax.

    Args:
        image_shape, levels: facts of the data.
        width: features a channel that the head reads.
        ordinal: W and the tables are `OrdinalRows`, which know that level 100 lies beside 101 and so learn sooner; one
            channel then has a head, too. False where a checkpoint does not say, as those from before it do not.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        levels: int,
        colour: Literal["autoregressive", "independent"] = "autoregressive",
        width: Annotated[int, Ge(1)] = 64,
        ordinal: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.levels = image_shape[0], levels
        self.has_colour = colour == "autoregressive" and self.channels > 1
        self.has_head = self.has_colour or ordinal
        self.out_channels = self.channels * (width if self.has_head else levels)
        pairs = combinations(range(self.channels), 2) if self.has_colour else ()
        self.tables = nn.ModuleDict({f"{b}_{c}": nn.Embedding(levels, width) for b, c in pairs})
        self.heads = nn.ModuleList(nn.Linear(width, levels) for _ in range(self.channels if self.has_head else 0))
        if ordinal:
            for module in (*self.tables.values(), *self.heads):
                parametrize.register_parametrization(module, "weight", OrdinalRows(levels))

    def channel_logits(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """log p(x_c | x_<c, earlier pixels), normalised: features [B,D,...], x [B,C,...] -> [B,V,...], >= float32."""
        return self._levels_last(features, x, c).movedim(-1, 1)

    def log_prob(self, features: Tensor, x: Tensor) -> Tensor:
        """Nats of each value: features [B,D,H,W], x uint8 [B,C,H,W] -> [B,C,H,W]."""
        channels = (self._levels_last(features, x, c) for c in range(self.channels))
        return torch.stack([p.gather(-1, x[:, c, ..., None].long())[..., 0] for c, p in enumerate(channels)], dim=1)

    def _levels_last(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """channel_logits as [B,...,V]: what channels-last memory, Linear and Embedding have at hand without a copy."""
        h = features.movedim(1, -1)
        if self.channels > 1:
            h = h.unflatten(-1, (self.channels, -1))[..., c, :]
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        for b in range(c if self.has_colour else 0):
            h = h + self.tables[f"{b}_{c}"](x[:, b].long())
        if self.has_head:
            head = self.heads[c]
            assert isinstance(head, nn.Linear)
            h = F.linear(F.relu(h), head.weight.to(h.dtype), head.bias.to(h.dtype))
        return h.log_softmax(-1)
