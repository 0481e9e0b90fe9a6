"""PixelCNN++, the network: two streams of gated residual blocks at three resolutions.

Paper: Salimans, Karpathy, Chen, Kingma 2017, PixelCNN++ (arXiv 1701.05517), sections 2.2 to 2.5 and figure 2. Its
    likelihood (section 2.1) is one of several that go with it, as with every network here.
What differs: the last convolution of each block and the upsampling start at zero, which trains at once and stands in
    for weight normalisation started from a batch of data; the first convolutions are 7 wide, not 3; what one
    resolution hands to the next finer one is added there to the end of the down pass, where the paper has a block
    more; any number of blocks; levels are read through a table, too. The class enters as in the paper's own code, as a
    bias before each gate.
Receptive field: every earlier pixel of images up to 8×8, from n_residual=2 on. Of larger ones the far ends are missed
    of the own row and of the rows just above, which no coarser pixel covers yet: on 28×28 with n_residual=6 at most
    42 pixels of 783, on 32×32 with the paper's 32 at most 4. `context` tells.
Training-mode loss: a likelihood.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.nn.caches import ImageRows, RowCache
from pixelcnn_lit.nn.embeddings import ClassEmbedding, LevelEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d

RESOLUTIONS = 3


class PixelCNNPP(nn.Module):
    """features = Net(x, y), [B,out_channels,H,W], at each pixel a function of the class and strictly earlier pixels.

    Two streams: `u`, downward, sees the rows above; `ul`, downward and rightward, also the pixels to the left in its
    own row, and reads `u` in every block.

    Args:
        image_shape, num_classes, levels: facts of the data.
        out_channels: features per pixel, which the likelihood asks for.
        hidden_channels, n_residual: width, and number of residual blocks of each stream, dealt to the up and the down
            pass at full, half and quarter resolution in turn: 6 is one block everywhere, 32 nearly the paper's 5 and 6.
        level_channels: width of the tables that levels are read through; 0 reads them as numbers alone, as published.
        conditional: false trains without the class.
        dropout: rate inside each block.
    """

    train_is_likelihood = True
    no_blind_spot = True
    body: Any

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: int,
        out_channels: int,
        hidden_channels: Annotated[int, Range(1)],
        n_residual: Annotated[int, Range(1, 1000)],
        level_channels: Annotated[int, Range(0)] = 0,
        conditional: bool = True,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = tuple(image_shape[1:])
        self.read = LevelEmbedding(image_shape[0], levels, level_channels)
        self.first_u = ShiftedConv2d(self.read.out_channels, hidden_channels, 7)
        self.first_ul = CausalConv2d(self.read.out_channels, hidden_channels, 7, "A")
        body = None
        for r in reversed(range(RESOLUTIONS)):
            n_up, n_down = ((n_residual - 1 - k) // (2 * RESOLUTIONS) + 1 for k in (2 * r, 2 * r + 1))
            body = Resolution(n_down, n_up, body, hidden_channels, num_classes, conditional, dropout)
        self.body = body
        self.out = nn.Conv2d(hidden_channels, out_channels, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x uint8 [B,C,H,W], y int64 [B] -> features [B,out_channels,H,W]."""
        pixels = self.read(x, like=self.out.weight)
        u = self.first_u(F.pad(pixels, (0, 0, 1, -1)))  # the image one row down: u[i] sees the rows before i
        _, ul = self.body(u, self.first_ul(pixels), y)
        return self.out(F.elu(ul))

    def init_cache(self, y: Tensor) -> dict[str, Any]:
        """All storage for stepping through images of the classes y [B]."""
        first_ul = self.first_ul.cache(partial(RowCache, batch=len(y), width=self.image_size[1]))
        first_u = self.first_u.cache(len(y), self.image_size[1])
        return {
            "image": ImageRows(first_ul, [first_u], self.read),
            "first_u": first_u,
            "row_above": first_ul.inputs[:, first_ul.side : -first_ul.side, -2].transpose(1, 2)[:, :, None],
            "body": self.body.init_cache(y, self.image_size[1]),
            "out": (self.out.bias, self.out.weight[..., 0, 0].T.contiguous()),
        }

    def step(self, cache: dict[str, Any], previous: Tensor, i: int, j: int) -> Tensor:
        """Features [B,D] at row i, column j, asked for in raster order; equal to `forward` there in eval mode.

        `previous` is the pixel before, uint8 [B,C]; it is ignored at (0, 0), where the cache is emptied. Where a row
        begins, u goes through all of it. Coarser resolutions work only where one of their rows or pixels begins.
        """
        image, first_u = cache["image"], cache["first_u"]
        image.advance(previous, i, j)
        if j == 0:
            first_u.put(cache["row_above"])
            self.body.step_u(cache["body"], first_u.output(), i)
        ul = self.body.step_ul(cache["body"], image.first.output(j), i, j)
        bias, matrix = cache["out"]
        return torch.addmm(bias, F.elu(ul), matrix)

    def context(self, i: int, j: int) -> Tensor:
        """The earlier pixels, bool [H,W], that the features at row i, column j depend on."""
        seen_ul = torch.zeros(self.image_size, dtype=torch.bool)
        seen_ul[i, j] = True
        u, ul = self.body.reach(torch.zeros_like(seen_ul), seen_ul)
        return F.pad(self.first_u.reach(u, u.shape), (0, 0, -1, 1)) | self.first_ul.reach(ul)


class Resolution(nn.Module):
    """The blocks of both streams at one resolution, and between their down and up pass the coarser resolutions.

    Why no feature sees too much. Let a pixel here stand for s×s of the image. u[I,J] sees only rows above row sI, and
    ul[I,J] only pixels before (sI, sJ) in raster order. The first convolutions begin so, with s = 1, and so it stays:
      * A shifted convolution reads rows <= I, and in ul only columns <= J; of u, ul reads the pixel at the same place.
      * `shrink` reads, for (I, J) of the next coarser resolution, rows <= 2I here, and in ul only columns <= 2J. What
        they may see ends at (s 2I, s 2J), and what (I, J) may see there is the same, for its pixels stand for 2s×2s.
      * `grow` reads, for (i, j) here, (i//2, j//2) there. What that sees ends at (2s (i//2), 2s (j//2)): in row si, no
        further than column sj, if i is even, and above it if i is odd. In u it reads also (i//2, (j+1)//2), which
        makes no difference: columns are free in u.
    So nothing is shifted where the resolution changes: a coarse pixel stands at the first of the four that read it.
    """

    down: Any
    up: Any
    coarser: Any

    def __init__(self, n_down: int, n_up: int, coarser: "Resolution | None", channels: int, *own: Any) -> None:
        super().__init__()
        self.down = nn.ModuleList(BlockPair(False, channels, *own) for _ in range(n_down))
        self.up = nn.ModuleList(BlockPair(k >= n_up - n_down, channels, *own) for k in range(n_up))
        self.coarser = coarser
        if coarser is not None:
            self.shrink_u, self.shrink_ul = (ShiftedConv2d(channels, channels, width, stride=2) for width in (3, 2))
            self.grow_u, self.grow_ul = (Upsampling(channels, width) for width in (3, 2))

    def forward(self, u: Tensor, ul: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """u, ul [B,channels,H,W] -> the same."""
        inputs = []
        for block in self.down:
            inputs.append((u, ul))
            u, ul = block(u, ul, y)
        if self.coarser is not None:
            coarse_u, coarse_ul = self.coarser(self.shrink_u(u), self.shrink_ul(ul), y)
            height, width = u.shape[2:]
            u = u + self.grow_u(coarse_u)[:, :, :height, :width]
            ul = ul + self.grow_ul(coarse_ul)[:, :, :height, :width]
        for block in self.up:
            u, ul = block(u, ul, y, *(inputs.pop() if block.has_shortcut else ()))
        return u, ul

    def init_cache(self, y: Tensor, width: int) -> dict[str, Any]:
        """What stepping through rows of `width` pixels keeps here and at the coarser resolutions."""
        cache: dict[str, Any] = {"down": [block.init_cache(y, width) for block in self.down]}
        cache["up"] = [block.init_cache(y, width) for block in self.up]
        cache["rows"] = [rows for block in cache["down"] + cache["up"] for rows in (*block["u"], *block["ul"])]
        if self.coarser is not None:
            cache |= {"shrink_u": self.shrink_u.cache(len(y), width), "shrink_ul": self.shrink_ul.cache(len(y), width)}
            cache["rows"] += [cache["shrink_u"], cache["shrink_ul"]]
            cache["coarser"] = self.coarser.init_cache(y, (width + 1) // 2)
            cache["ul"] = [None] * ((width + 1) // 2)  # per coarse column, what its four pixels read: [B,C,2,2]
        return cache

    def step_u(self, cache: dict[str, Any], u: Tensor, i: int) -> Tensor:
        """u at row i, [B,channels,1,W] -> the same."""
        inputs = []
        begin_row(i, *cache["rows"])
        for block, own in zip(self.down, cache["down"], strict=True):
            inputs.append(u)
            u = block.step_u(own, u)
        if self.coarser is not None:
            cache["shrink_u"].put(u)
            if i % 2 == 0:
                coarse = self.coarser.step_u(cache["coarser"], cache["shrink_u"].output(), i // 2)
                cache["u"] = self.grow_u(coarse)[..., : u.shape[3]]  # two rows
            u = u + cache["u"][:, :, i % 2, None]
        for block, own in zip(self.up, cache["up"], strict=True):
            u = block.step_u(own, u, inputs.pop() if block.has_shortcut else None)
        return u

    def step_ul(self, cache: dict[str, Any], ul: Tensor, i: int, j: int) -> Tensor:
        """ul at row i, column j, [B,channels] -> the same."""
        inputs = []
        for block, own in zip(self.down, cache["down"], strict=True):
            inputs.append(ul)
            ul = block.step_ul(own, ul, j)
        if self.coarser is not None:
            cache["shrink_ul"].put(ul, j)
            if (i % 2, j % 2) == (0, 0):
                coarse = self.coarser.step_ul(cache["coarser"], cache["shrink_ul"].output(j), i // 2, j // 2)
                cache["ul"][j // 2] = self.grow_ul(coarse[..., None, None])
            ul = ul + cache["ul"][j // 2][..., i % 2, j % 2]
        for block, own in zip(self.up, cache["up"], strict=True):
            ul = block.step_ul(own, ul, j, inputs.pop() if block.has_shortcut else None)
        return ul

    def reach(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of both streams, bool [H,W], that the outputs in u and ul, bool [H,W], are computed from.

        Short-cuts add none: what the block at their end reads reaches it along the streams, too.
        """
        for block in reversed(self.up):
            u, ul = block.reach(u, ul)
        if self.coarser is not None:
            coarse_u, coarse_ul = self.coarser.reach(self.grow_u.reach(u), self.grow_ul.reach(ul))
            u, ul = u | self.shrink_u.reach(coarse_u, u.shape), ul | self.shrink_ul.reach(coarse_ul, ul.shape)
        for block in reversed(self.down):
            u, ul = block.reach(u, ul)
        return u, ul


class BlockPair(nn.Module):
    """A block of each stream; that of ul reads what that of u made. With a short-cut, each reads one more input."""

    recomputable = True

    def __init__(self, has_shortcut: bool, *own: Any) -> None:
        super().__init__()
        self.has_shortcut = has_shortcut
        self.u, self.ul = GatedBlock(3, int(has_shortcut), *own), GatedBlock(2, 1 + has_shortcut, *own)

    def forward(self, u: Tensor, ul: Tensor, y: Tensor, *shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """u, ul and the short-cuts of the two [B,channels,H,W] -> the new u, ul."""
        u = self.u(u, y, *shortcut[:1])
        return u, self.ul(ul, y, u, *shortcut[1:])

    def init_cache(self, y: Tensor, width: int) -> dict[str, Any]:
        cache: dict[str, Any] = {"u": self.u.init_cache(y, width), "ul": self.ul.init_cache(y, width)}
        if self.has_shortcut:
            cache["shortcut"] = self.ul.aux[1].weight[..., 0, 0].T.contiguous()
        return cache

    def step_u(self, cache: dict[str, Any], u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """u and its short-cut of a whole row, [B,channels,1,W] -> the new u."""
        u = self.u.step(cache["u"], u, 0 if shortcut is None else self.u.aux[0](concat_elu(shortcut)))
        cache["ul_reads"] = self.ul.aux[0](concat_elu(u))[:, :, 0].unbind(-1)  # a column each, [B,channels]
        return u

    def step_ul(self, cache: dict[str, Any], ul: Tensor, j: int, shortcut: Tensor | None = None) -> Tensor:
        """ul and its short-cut at column j, [B,channels] -> the new ul."""
        read = cache["ul_reads"][j]
        if shortcut is not None:
            read = torch.addmm(read, concat_elu(shortcut), cache["shortcut"])
        return self.ul.step(cache["ul"], ul, read, j)

    def reach(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        """What of u and of ul the outputs in u and ul, bool [H,W], are computed from."""
        ul, read = self.ul.reach(ul)
        return self.u.reach(u | read)[0], ul


class GatedBlock(nn.Module):
    """x + a σ(b), where a, b = conv2(h) + class and h = conv1(x) + Σ conv1×1(aux), each read through concat-ELU.

    Args:
        width: columns of the kernels, 3 in u and 2 in ul.
        n_aux: inputs from elsewhere at the same pixel: of the other stream, or by a short-cut.
    """

    aux: Any

    def __init__(
        self, width: int, n_aux: int, channels: int, num_classes: int, conditional: bool, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = ShiftedConv2d(2 * channels, channels, width)
        self.aux = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1, bias=False) for _ in range(n_aux))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ShiftedConv2d(2 * channels, 2 * channels, width)
        self.embed = ClassEmbedding(num_classes, 2 * channels, conditional)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, y: Tensor, *aux: Tensor) -> Tensor:
        """x and each aux [B,channels,H,W] -> [B,channels,H,W]."""
        h = self.conv1(x, concat_elu)
        for conv, other in zip(self.aux, aux, strict=True):
            h = h + conv(concat_elu(other))
        h = self.conv2(h, lambda h: self.dropout(concat_elu(h)))
        a, b = (h + self.embed(y).to(h.dtype)).chunk(2, dim=1)  # in h's dtype: bf16 streams stay bf16 under autocast
        return x + a * b.sigmoid()

    def init_cache(self, y: Tensor, width: int) -> tuple[Any, Any]:
        conv1, conv2 = self.conv1.cache(len(y), width), self.conv2.cache(len(y), width)
        conv2.bias = conv2.bias + self.embed(y)[..., 0, 0]
        return conv1, conv2

    def step(self, cache: tuple[Any, Any], x: Tensor, read: Tensor | int, j: int = 0) -> Tensor:
        """`forward` at column j, [B,channels], or in u of a whole row, [B,channels,1,W]; `read` is Σ conv1×1(aux)."""
        conv1, conv2 = cache
        conv1.put(concat_elu(x), j)
        conv2.put(concat_elu(conv1.output(j) + read), j)
        a, b = conv2.output(j).chunk(2, dim=1)
        return x + a * b.sigmoid()

    def reach(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs in `seen`, bool [H,W], are computed from: of x, and of each aux."""
        inside = self.conv2.reach(seen, seen.shape)
        return seen | self.conv1.reach(inside, seen.shape), inside


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and of -x: [B,C,...] -> [B,2C,...] (Shang et al. 2016, arXiv 1603.05201, with ELU)."""
    return F.elu(torch.cat([x, -x], dim=1), inplace=True)


class ShiftedConv2d(nn.Conv2d):
    """A convolution of two rows, the one above and its own, by `width` columns: 2 reach to the left, 3 or 7 both ways.

    [B,in,H,W], after the activation if there is one, -> [B,out,⌈H/stride⌉,⌈W/stride⌉]. Output (I, J) stands at input
    (stride I, stride J).
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (2, width), stride)
        self.margins = (width // 2, (width - 1) // 2, 1, 0)  # left, right, above, below
        fan_in = self.weight[0].numel() * 0.645  # concat-ELU keeps so much of the mean square of a normal
        nn.init.normal_(self.weight, std=1 / math.sqrt(fan_in))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The convolution of the input, or of what `activation` makes of it, which must leave zeros zero.

        conv2d's own padding is the same on both sides, and would make outputs that nobody reads. What an activation
        made would be kept once more for the backward pass if it was padded afterwards.
        """
        padded = F.pad(input, self.margins)
        return super().forward(activation(padded) if activation else padded)

    def cache(self, batch: int, width: int) -> "RowCache | WholeRows":
        """What computes this convolution of a row of `width`: pixel by pixel in ul, the row at once in u."""
        if self.kernel_size[1] > 2:
            return WholeRows(self, batch, width)
        assert self.bias is not None
        return RowCache(self.weight, self.bias, torch.ones_like(self.weight[:1, :1]), batch, width)

    def reach(self, seen: Tensor, size: tuple[int, ...]) -> Tensor:
        """The inputs, bool [H,W] of `size`, that the outputs in `seen` are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.pad(seen.to(ones)[None, None], (0, 1, 0, 1))
        read = F.conv_transpose2d(padded, ones, stride=self.stride, padding=(1, self.kernel_size[1] // 2))
        return read[0, 0, : size[0], : size[1]] > 0


class WholeRows:
    """A ShiftedConv2d of u computed a row at a time, used like a RowCache, whose column is of no matter here."""

    def __init__(self, conv: ShiftedConv2d, batch: int, width: int) -> None:
        assert conv.bias is not None
        self.weight, self.bias, self.stride, self.side = conv.weight, conv.bias, conv.stride, conv.kernel_size[1] // 2
        self.inputs = conv.weight.new_zeros(batch, conv.in_channels, 2, width)

    def reset(self) -> None:
        self.inputs.zero_()

    def new_row(self) -> None:
        self.inputs[:, :, 0] = self.inputs[:, :, 1]

    def put(self, x: Tensor, j: int = 0) -> None:
        """The input of the row, [B,in,1,W]."""
        self.inputs[:, :, 1:] = x

    def output(self, j: int = 0) -> Tensor:
        """The convolution of the row: [B,out,1,⌈W/stride⌉]."""
        bias = self.bias[..., None, None]  # [out] or [B,out]
        return F.conv2d(self.inputs, self.weight, stride=self.stride, padding=(0, self.side)) + bias


def begin_row(i: int, *caches: RowCache | WholeRows) -> None:
    """What was the current row becomes the one above; above row 0 there is nothing, whatever image came before."""
    for rows in caches:
        rows.new_row() if i else rows.reset()


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

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [⌈H/2⌉,⌈W/2⌉], that the outputs in `seen`, bool [H,W], are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.pad(seen.to(ones)[None, None], (0, 1, 0, 1))
        read = F.conv2d(padded, ones, stride=2, padding=self.padding)
        return read[0, 0, :, : (seen.shape[1] + 1) // 2] > 0
