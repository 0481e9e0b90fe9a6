"""PixelCNN++, the network: two streams of gated residual blocks at three resolutions.

Paper: Salimans, Karpathy, Chen, Kingma 2017, PixelCNN++ (arXiv 1701.05517), sections 2.2 to 2.5 and figure 2. Its
    likelihood (section 2.1) is one of several that go with it, as with every network here.
What differs: the last convolution of each block and the upsampling start at zero, which trains at once and stands in
    for weight normalisation started from a batch of data; the first convolutions are 7 wide, not 3; what one
    resolution hands to the next finer one is added there to the end of the down pass, where the paper has a block
    more; any number of blocks; where asked for, a block within each pixel before the features. The class enters as in
    the paper's own code, as a bias before each gate.
Receptive field: every earlier pixel of images up to 8×8, from n_residual=2 on. Of larger ones the far ends are missed
    of the own row and of the rows just above, which no coarser pixel covers yet: on 28×28 with n_residual=6 at most
    42 pixels of 783, on 32×32 with the paper's 32 at most 4. `receptive_field` tells.
Training-mode loss: a likelihood.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import Convolution, RasterState, RowCache
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, Layers
from pixelcnn_lit.nn.wavefronts import At

RESOLUTIONS = 3


def dealt(n_residual: int, resolution: int) -> tuple[int, int]:
    """Return how many of so many blocks the down and the up pass have at a resolution, 0 the finest."""
    up, down = ((n_residual - 1 - k) // (2 * RESOLUTIONS) + 1 for k in (2 * resolution, 2 * resolution + 1))
    return down, up


class PixelCNNPP(nn.Module):
    """Two streams at three resolutions: see `Network` for its arguments and what it returns.

    `u`, downward, sees the rows above; `ul`, downward and rightward, also the pixels to the left in its own row, and
    reads `u` in every block.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks of each stream, dealt to the up and the down
            pass at full, half and quarter resolution in turn: 6 is one block everywhere, 32 nearly the paper's 5 and 6.
        dropout: rate inside each block.
        expansion: width inside a last `PixelBlock`, in hidden_channels; 0 is none, as in checkpoints from before it.

    Example:
        >>> net = PixelCNNPP((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
        >>> net(torch.randn(3, 2, 5, 4), torch.tensor([0, 9, 10])).shape
        torch.Size([3, 7, 5, 4])
    """

    train_is_likelihood = True
    no_blind_spot = True

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        out_channels: int,
        hidden_channels: Annotated[int, Ge(1)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
        expansion: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.first_u = ShiftedConv2d(in_channels, hidden_channels, 7)
        self.first_ul = CausalConv2d(in_channels, hidden_channels, 7, "A")
        body = None
        for r in reversed(range(1, RESOLUTIONS)):
            body = Resolution(*dealt(n_residual, r), body, hidden_channels, num_classes, dropout)
        self.body = Resolution(*dealt(n_residual, 0), body, hidden_channels, num_classes, dropout)
        self.last = PixelBlock(hidden_channels, expansion) if expansion else nn.Identity()
        self.out = nn.Conv2d(hidden_channels, out_channels, 1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        u = self.first_u(F.pad(h, (0, 0, 1, -1)))  # the image one row down: u[i] sees the rows before i
        _, ul = self.body(u, self.first_ul(h), y)
        return self.out(F.elu(self.last(ul)))

    def stepper(self, y: Tensor) -> "PixelCNNPPStepper":
        return PixelCNNPPStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        seen_ul = torch.zeros(self.image_size, dtype=torch.bool)
        seen_ul[i, j] = True
        u, ul = self.body.receptive_field(torch.zeros_like(seen_ul), seen_ul)
        rows_above = F.pad(self.first_u.receptive_field(u, u.shape), (0, 0, -1, 1))
        return rows_above | self.first_ul.receptive_field(ul)


class PixelCNNPPStepper:
    """A `PixelCNNPP` in steps.

    Where a row begins, u goes through all of it. Coarser resolutions work where one of their rows or pixels begins.
    """

    replayable = False

    def __init__(self, net: PixelCNNPP, y: Tensor) -> None:
        self.skew = width = net.image_size[1]
        self.state = RasterState(len(y), width)
        self.first_ul = first_ul = net.first_ul.cache(self.state)
        self.row_above = first_ul.inputs[:, first_ul.side : -first_ul.side, -2].transpose(1, 2)[:, :, None]
        self.first_u = WholeRows(net.first_u, len(y), width)
        self.state.others.append(self.first_u)
        self.body = ResolutionStepper(net.body, y, width)
        self.last = PixelBlockStepper(net.last) if isinstance(net.last, PixelBlock) else None
        self.bias = net.out.bias
        self.matrix = net.out.weight[..., 0, 0].T.contiguous()

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        if at.column == 0:
            self.first_u.write(self.row_above, at)
            self.body.step_u(self.first_u.output(at), at)
        ul = self.body.step_ul(self.first_ul.output(at), at)
        if self.last:
            ul = self.last.step(ul)
        assert self.bias is not None
        return torch.addmm(self.bias, F.elu(ul), self.matrix)


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

    def __init__(
        self, n_down: int, n_up: int, coarser: "Resolution | None", channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.down: Layers[BlockPair] = Layers(BlockPair(False, channels, num_classes, dropout) for _ in range(n_down))
        self.up: Layers[BlockPair] = Layers(
            BlockPair(k >= n_up - n_down, channels, num_classes, dropout) for k in range(n_up)
        )
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

    def receptive_field(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of both streams, bool [H,W], that the outputs in u and ul, bool [H,W], are computed from.

        Short-cuts add none: what the block at their end reads reaches it along the streams, too.
        """
        for block in reversed(list(self.up)):
            u, ul = block.receptive_field(u, ul)
        if self.coarser is not None:
            coarse = self.grow_u.receptive_field(u), self.grow_ul.receptive_field(ul)
            coarse_u, coarse_ul = self.coarser.receptive_field(*coarse)
            u = u | self.shrink_u.receptive_field(coarse_u, u.shape)
            ul = ul | self.shrink_ul.receptive_field(coarse_ul, ul.shape)
        for block in reversed(list(self.down)):
            u, ul = block.receptive_field(u, ul)
        return u, ul


class ResolutionStepper:
    """A `Resolution`, and the coarser ones, in steps through rows of `width` pixels."""

    def __init__(self, resolution: Resolution, y: Tensor, width: int) -> None:
        self.down = [BlockPairStepper(block, y, width) for block in resolution.down]
        self.up = [BlockPairStepper(block, y, width) for block in resolution.up]
        self.rows = [rows for pair in (*self.down, *self.up) for rows in pair.rows]
        self.coarser = None
        if resolution.coarser is not None:
            self.shrink_u = WholeRows(resolution.shrink_u, len(y), width)
            self.shrink_ul = RowCache(resolution.shrink_ul.all_taps(), len(y), width)
            self.rows += [self.shrink_u, self.shrink_ul]
            self.grow_u = resolution.grow_u
            self.coarser = ResolutionStepper(resolution.coarser, y, (width + 1) // 2)
            self.grow_ul = PixelUpsampling(resolution.grow_ul, len(y), (width + 1) // 2)

    def step_u(self, u: Tensor, at: At) -> Tensor:
        """u at a row, [B,channels,1,W] -> the same."""
        inputs = []
        for rows in self.rows:
            rows.new_row() if at.row else rows.reset()
        for block in self.down:
            inputs.append(u)
            u = block.step_u(u, at)
        if self.coarser is not None:
            self.shrink_u.write(u, at)
            if at.row % 2 == 0:
                coarse = self.coarser.step_u(self.shrink_u.output(at), at.coarser())
                self.coarse_u = self.grow_u(coarse)[..., : u.shape[3]]  # two rows
            u = u + self.coarse_u[:, :, at.row % 2, None]
        for block in self.up:
            u = block.step_u(u, at, inputs.pop() if block.has_shortcut else None)
        return u

    def step_ul(self, ul: Tensor, at: At) -> Tensor:
        """ul at a pixel, [B,channels] -> the same."""
        inputs = []  # after concat-ELU, as the blocks keep them
        for block in self.down:
            ul = block.step_ul(ul, at)
            inputs.append(block.ul.conv1.slot(at))
        if self.coarser is not None:
            self.shrink_ul.write(ul, at)
            if (at.row % 2, at.column % 2) == (0, 0):
                coarse = self.coarser.step_ul(self.shrink_ul.output(at), at.coarser())
                self.grow_ul.write(coarse, at)
            ul = ul + self.grow_ul.output(at)
        for block in self.up:
            ul = block.step_ul(ul, at, inputs.pop() if block.has_shortcut else None)
        return ul


class BlockPair(nn.Module):
    """A block of each stream; that of ul reads what that of u made. With a short-cut, each reads one more input."""

    checkpointable = True

    def __init__(self, has_shortcut: bool, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.has_shortcut = has_shortcut
        own = channels, num_classes, dropout
        self.u, self.ul = GatedBlock(3, int(has_shortcut), *own), GatedBlock(2, 1 + has_shortcut, *own)

    def forward(self, u: Tensor, ul: Tensor, y: Tensor, *shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """u, ul and the short-cuts of the two [B,channels,H,W] -> the new u, ul."""
        u = self.u(u, y, *shortcut[:1])
        return u, self.ul(ul, y, u, *shortcut[1:])

    def receptive_field(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        """Return what of u and of ul the outputs in u and ul, bool [H,W], are computed from."""
        ul, read = self.ul.receptive_field(ul)
        return self.u.receptive_field(u | read)[0], ul


class BlockPairStepper:
    """A `BlockPair` in steps."""

    def __init__(self, pair: BlockPair, y: Tensor, width: int) -> None:
        self.has_shortcut = pair.has_shortcut
        self.u = GatedRowStepper(pair.u, y, width)
        self.ul = GatedPixelStepper(pair.ul, y, width)
        self.rows = [self.u.conv1, self.u.conv2, self.ul.conv1, self.ul.conv2]
        self.aux_u = list(pair.u.aux)
        self.read_weight, *shortcut = (conv.weight for conv in pair.ul.aux)
        if self.has_shortcut:
            self.shortcut = shortcut[0][..., 0, 0].T.contiguous()

    def step_u(self, u: Tensor, at: At, shortcut: Tensor | None = None) -> Tensor:
        """u and its short-cut of a whole row, [B,channels,1,W] -> the new u."""
        u = self.u.step(u, 0 if shortcut is None else self.aux_u[0](concat_elu(shortcut)), at)
        reads = F.conv2d(concat_elu(u), self.read_weight, self.ul.conv1_bias)
        self.ul_reads = reads[:, :, 0].unbind(-1)  # a column each, [B,channels]
        return u

    def step_ul(self, ul: Tensor, at: At, shortcut: Tensor | None = None) -> Tensor:
        """ul at a pixel, [B,channels], and its short-cut after concat-ELU, [B,2 channels] -> the new ul."""
        read = self.ul_reads[at.column]
        if shortcut is not None:
            read = torch.addmm(read, shortcut, self.shortcut)
        return self.ul.step(ul, read, at)


class GatedBlock(nn.Module):
    """x + a σ(b), where a, b = conv2(h) + class and h = conv1(x) + Σ conv1×1(aux), each read through concat-ELU.

    Args:
        width: columns of the kernels, 3 in u and 2 in ul.
        n_aux: inputs from elsewhere at the same pixel: of the other stream, or by a short-cut.
    """

    def __init__(self, width: int, n_aux: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = ShiftedConv2d(2 * channels, channels, width)
        self.aux: Layers[nn.Conv2d] = Layers(nn.Conv2d(2 * channels, channels, 1, bias=False) for _ in range(n_aux))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ShiftedConv2d(2 * channels, 2 * channels, width)
        self.embed = ClassEmbedding(num_classes, 2 * channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, y: Tensor, *aux: Tensor) -> Tensor:
        """x and each aux [B,channels,H,W] -> [B,channels,H,W]."""
        h = self.conv1(x, concat_elu)
        for conv, other in zip(self.aux, aux, strict=True):
            h = h + conv(concat_elu(other))
        h = self.conv2(h, lambda h: self.dropout(concat_elu(h)))
        a, b = (h + self.embed(y, h.dtype)).chunk(2, dim=1)
        return x + a * b.sigmoid()

    def receptive_field(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the outputs in `seen`, bool [H,W], are computed from: of x, and of each aux."""
        inside = self.conv2.receptive_field(seen, seen.shape)
        return seen | self.conv1.receptive_field(inside, seen.shape), inside


class GatedRowStepper:
    """A `GatedBlock` of u in steps, without dropout: a whole row at once."""

    def __init__(self, block: GatedBlock, y: Tensor, width: int) -> None:
        self.conv1 = ConcatELURows(block.conv1, len(y), width)
        self.conv2 = ConcatELURows(block.conv2, len(y), width)
        self.conv2.bias = self.conv2.bias + block.embed.rows(y)

    def step(self, x: Tensor, read: Tensor | int, at: At) -> Tensor:
        """x [B,channels,1,W] -> the same; `read` is Σ conv1×1(aux)."""
        self.conv1.write(x, at)
        self.conv2.write(self.conv1.output(at) + read, at)
        a, b = self.conv2.output(at).chunk(2, dim=1)
        return x + a * b.sigmoid()


class GatedPixelStepper:
    """A `GatedBlock` of ul in steps, without dropout: pixel by pixel, in few calls, each of which takes its time."""

    def __init__(self, block: GatedBlock, y: Tensor, width: int) -> None:
        self.conv1 = ConcatELUCache(block.conv1, len(y), width)
        self.conv2 = ConcatELUCache(block.conv2, len(y), width)
        self.conv2.bias = self.conv2.bias + block.embed.rows(y)
        self.conv1_bias = block.conv1.bias
        self.a, self.b = self.conv2.result.chunk(2, dim=1)  # what its `output` writes to

    def step(self, x: Tensor, read: Tensor, at: At) -> Tensor:
        """x [B,channels] -> the same; `read` is Σ conv1×1(aux) and the bias of the first convolution."""
        self.conv1.write(x, at)
        self.conv2.write(torch.addmm(read, self.conv1.taps(at), self.conv1.matrix), at)
        self.conv2.output(at)
        return torch.addcmul(x, self.a, self.b.sigmoid_())


class PixelBlock(nn.Module):
    """x + W relu(V norm(x))², within each pixel: [B,C,...] -> the same; the identity at the start.

    It costs less than a pair of blocks at full resolution, and lowered the loss more (conf/experiment/README.md).
    Blocks of 1×1 convolutions did so for Zhang, Zhang, McDonagh 2021 (arXiv 2109.02639). The squared ReLU: So et al.
    2021, Primer (arXiv 2109.08668).
    """

    EPS = 1e-5  # of the norm

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, expansion * channels)
        self.project = nn.Linear(expansion * channels, channels)
        nn.init.normal_(self.expand.weight, std=1 / math.sqrt(channels))
        nn.init.zeros_(self.expand.bias)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x.movedim(1, -1)
        h = F.rms_norm(h, h.shape[-1:], eps=self.EPS)
        return x + self.project(F.relu(self.expand(h)).square()).movedim(-1, 1)


class PixelBlockStepper:
    """A `PixelBlock` at a pixel, in few calls."""

    def __init__(self, block: PixelBlock) -> None:
        self.expand_bias, self.project_bias = block.expand.bias, block.project.bias
        self.expand = block.expand.weight.T.contiguous()
        self.project = block.project.weight.T.contiguous()
        self.eps = self.expand.new_full((1, 1), PixelBlock.EPS)

    def step(self, x: Tensor) -> Tensor:
        """[B,C] -> [B,C]."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        scale = torch.addcmul(self.eps, norm, norm, value=1 / x.shape[1]).rsqrt_()
        h = torch.addmm(self.expand_bias, x * scale, self.expand).clamp_min_(0)
        return torch.addmm(x, h.square_(), self.project).add_(self.project_bias)


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and of -x: [B,C,...] -> [B,2C,...] (Shang et al. 2016, arXiv 1603.05201, with ELU)."""
    if torch.compiler.is_compiling():  # one pass, with one exponential for both; a compiler finds neither by itself
        below = torch.exp(-x.abs()) - 1
        return torch.cat([torch.where(x >= 0, x, below), torch.where(x > 0, below, -x)], dim=1)
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

    def all_taps(self) -> Convolution:
        """Return it as a `RowCache` takes it, if it reaches to the left alone."""
        assert self.bias is not None
        return Convolution(self.weight, self.bias, torch.ones_like(self.weight[:1, :1]))

    def receptive_field(self, seen: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the inputs, bool [H,W] of `size`, that the outputs in `seen` are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.pad(seen.to(ones)[None, None], (0, 1, 0, 1))
        read = F.conv_transpose2d(padded, ones, stride=self.stride, padding=(1, self.kernel_size[1] // 2))
        return read[0, 0, : size[0], : size[1]] > 0


class ConcatELUCache(RowCache):
    """The cache of a `ShiftedConv2d` that reads concat-ELU, which is made in its memory."""

    def __init__(self, conv: ShiftedConv2d, batch: int, width: int) -> None:
        super().__init__(conv.all_taps(), batch, width)
        self.halves = [slot.chunk(2, dim=1) for slot in self.slots]

    def write(self, x: Tensor, at: At) -> None:
        """Take concat_elu(x), of x [B,in/2], as the inputs."""
        as_it_is, negative = self.halves[at.column]
        as_it_is.copy_(x)
        torch.neg(x, out=negative)
        F.elu_(self.slots[at.column])


class WholeRows:
    """A `ShiftedConv2d` of u computed a row at a time, used like a `RowCache`, whose column is of no matter here."""

    def __init__(self, conv: ShiftedConv2d, batch: int, width: int) -> None:
        assert conv.bias is not None
        self.weight = conv.weight
        self.bias = conv.bias
        self.stride = conv.stride
        self.side = conv.kernel_size[1] // 2
        size = batch, conv.in_channels, 2, width
        self.inputs = conv.weight.new_zeros(size).contiguous(memory_format=torch.channels_last)

    def reset(self) -> None:
        """Forget an image."""
        self.inputs.zero_()

    def new_row(self) -> None:
        """Take what was the current row as the one above."""
        self.inputs[:, :, 0] = self.inputs[:, :, 1]

    def write(self, x: Tensor, at: At) -> None:
        """Take x [B,in,1,W] as the input of the row."""
        self.inputs[:, :, 1:] = x

    def output(self, at: At) -> Tensor:
        """Return the convolution of the row: [B,out,1,⌈W/stride⌉]."""
        bias = self.bias[..., None, None]  # [out] or [B,out]
        return F.conv2d(self.inputs, self.weight, stride=self.stride, padding=(0, self.side)) + bias


class ConcatELURows(WholeRows):
    """The rows of a `ShiftedConv2d` that reads concat-ELU, which is made in their memory."""

    def __init__(self, conv: ShiftedConv2d, batch: int, width: int) -> None:
        super().__init__(conv, batch, width)
        self.as_it_is, self.negative = self.inputs[:, :, 1:].chunk(2, dim=1)

    def write(self, x: Tensor, at: At) -> None:
        """Take concat_elu(x), of x [B,in/2,1,W], as the input of the row: one exponential serves both of its halves."""
        below = x.abs().neg_().exp_().sub_(1)
        torch.maximum(x, below, out=self.as_it_is)
        torch.maximum(-x, below, out=self.negative)


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

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [⌈H/2⌉,⌈W/2⌉], that the outputs in `seen`, bool [H,W], are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.pad(seen.to(ones)[None, None], (0, 1, 0, 1))
        read = F.conv2d(padded, ones, stride=2, padding=self.padding)
        return read[0, 0, :, : (seen.shape[1] + 1) // 2] > 0


class PixelUpsampling:
    """An `Upsampling` of ul pixel by pixel, each of which four finer ones read: of a row of `width` coarse pixels."""

    def __init__(self, layer: Upsampling, batch: int, width: int) -> None:
        assert layer.bias is not None
        self.matrix = layer.weight.permute(0, 2, 3, 1).flatten(1).contiguous()  # [in,2*2*out]
        self.bias = layer.bias.repeat(4)
        self.results = self.matrix.new_empty(width, batch, self.matrix.shape[1]).unbind()
        self.pixels = [result.chunk(4, dim=1) for result in self.results]

    def write(self, coarse: Tensor, at: At) -> None:
        """Take the coarse pixel, [B,in], whose first fine one is at `at`."""
        torch.addmm(self.bias, coarse, self.matrix, out=self.results[at.column // 2])

    def output(self, at: At) -> Tensor:
        """Return what a fine pixel reads, [B,out]."""
        return self.pixels[at.column // 2][2 * (at.row % 2) + at.column % 2]
