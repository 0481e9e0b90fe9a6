"""The published PixelCNN, beside the same network written out in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from tiny import check_receptive_field, density, make, redraw
from torch import Tensor, nn

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.models.pixelcnn_published import PublishedPixelCNN
from pixelcnn_lit.nn.layers import CausalConv2d

ADAM = {"lr": 3e-4, "weight_decay": 1e-5}


class MaskedConv2d(nn.Conv2d):
    """A dense kernel times its mask."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, mask_type: str) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        middle = kernel_size // 2
        mask = torch.ones(kernel_size, kernel_size)
        mask[middle, middle + (mask_type == "B") :] = 0
        mask[middle + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Plain(nn.Module):
    """As described: no class of the program's in it."""

    def __init__(self, channels: int, width: int, n_residual: int, kernel_size: int, num_classes: int) -> None:
        super().__init__()
        sizes = [(channels, width, kernel_size, "A")] + (2 * n_residual + 2) * [(width, width, 3, "B")]
        self.convolutions = nn.ModuleList(MaskedConv2d(*size) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in sizes)
        self.out = MaskedConv2d(width, 256 * channels, 1, "B")
        self.classes = nn.Embedding(num_classes, width)

    def forward(self, images: Tensor, y: Tensor) -> Tensor:
        """Levels 0..255 [B,C,H,W] -> logits [B,256*C,H,W]."""
        layers = list(zip(self.convolutions, self.norms, strict=True))
        convolution, norm = layers[0]
        x = F.relu(norm(convolution(images.double() / 255)))
        x = x + self.classes(y)[:, :, None, None]
        inside, last = layers[1:-2], layers[-2:]
        for first, second in zip(inside[::2], inside[1::2], strict=True):
            h = F.relu(first[1](first[0](x)))
            x = F.relu(x + second[1](second[0](h)))
        for convolution, norm in last:
            x = F.relu(norm(convolution(x)))
        return self.out(x)


@torch.no_grad()
def the_same(ours: Density, plain: Plain) -> None:
    """Copy all weights and statistics, in the order in which they are used."""
    kernels = [m for m in ours.network.modules() if isinstance(m, CausalConv2d)]
    for mine, theirs in zip(kernels, [*plain.convolutions, plain.out], strict=True):
        theirs.weight.zero_()[:, :, : mine.weight.shape[2]] = mine.weight
        theirs.bias.copy_(mine.bias)
    norms = [m for m in ours.network.modules() if isinstance(m, nn.BatchNorm2d)]
    for mine, theirs in zip(norms, plain.norms, strict=True):
        theirs.load_state_dict(mine.state_dict())
    plain.classes.weight.copy_(ours.network.embed.table.weight[:-1])


@pytest.mark.parametrize(("channels", "kernel_size"), [(1, 7), (3, 7), (3, 5)])
def test_the_published_network_is_that_of_plain_torch_and_stays_it_in_training(channels, kernel_size):
    published = f"pixelcnn_published model.kernel_size={kernel_size} model.hidden_channels=16"
    ours = density(published, "categorical_independent", (channels, 9, 8), levels=256, n_residual=3).double()
    redraw(ours)
    plain = Plain(channels, 16, 3, kernel_size, num_classes=3).double()
    the_same(ours, plain)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (6, channels, 9, 8), generator=generator, dtype=torch.uint8)
    y = torch.tensor([0, 1, 2, 2, 1, 0])

    def compare() -> None:
        assert (ours.features(x, y) - plain(x, y)).abs().max() < 1e-9

    plain.eval()
    compare()
    ours.train()
    plain.train()
    compare()
    steps = [torch.optim.Adam(model.parameters(), **ADAM) for model in (ours, plain)]
    logits = plain(x, y).view(6, channels, 256, 9, 8)
    theirs = F.cross_entropy(logits.movedim(2, 1), x.long())
    mine = ours(x, y).mean() / ours.dims
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    for loss, step in zip((mine, theirs), steps, strict=True):
        loss.backward()
        step.step()
    compare()
    ours.eval()
    plain.eval()
    compare()


def test_the_baseline_has_as_many_live_weights_as_published():
    sizes = "model.hidden_channels=256 model.n_residual=15"
    model = density(f"pixelcnn_published {sizes}", "categorical_independent", (3, 32, 32), levels=256, num_classes=10)
    dead = 0
    for layer in model.modules():
        if isinstance(layer, CausalConv2d):
            dead += layer.weight[..., 0, 0].numel() * int((layer.mask == 0).sum())
    live = sum(parameter.numel() for parameter in model.parameters()) - dead
    no_class = 256
    assert live - no_class == 10_729_472
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 33


def test_the_first_weights_are_those_of_torchs_own_layers():
    torch.manual_seed(0)
    network = PublishedPixelCNN((4, 4), 64, num_classes=1000, out_channels=256, hidden_channels=64, n_residual=1)
    theirs = nn.Conv2d(64, 64, 7)
    mine = network.first.conv
    live = mine.weight[:, :, mine.mask[0, 0] > 0]
    assert float(live.std()) == pytest.approx(float(theirs.weight.std()), rel=0.02)
    assert float(live.abs().max()) == pytest.approx(float(theirs.weight.abs().max()), rel=0.01)
    assert float(mine.bias.abs().max()) == pytest.approx(float(theirs.bias.abs().max()), rel=0.1)
    assert float(network.embed.table.weight.std()) == pytest.approx(1, rel=0.02)
    assert not mine.weight[:, :, mine.mask[0, 0] == 0].any()


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
def test_other_kernels_step_as_well(kernel_size):
    published = f"pixelcnn_published model.kernel_size={kernel_size}"
    check_receptive_field(make(published, "categorical", (1, 7, 7), levels=17))
    model = make(published, "categorical", (1, 6, 7), levels=17)
    assert model.stepper(torch.tensor([0])).skew == kernel_size // 2 + 1
    stepwise, whole = (model.sample(3, seed=1, method=method) for method in ("cached", "naive"))
    assert torch.equal(stepwise, whole)


def test_an_even_kernel_is_refused():
    with pytest.raises(UserError, match=r"model: kernel_size=4: must be odd"):
        density("pixelcnn_published model.kernel_size=4", "categorical")
