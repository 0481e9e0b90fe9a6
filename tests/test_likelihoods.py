"""What the laws of every likelihood do not ask: each one against its paper, at extremes, and at its start."""

import copy
import itertools
import math

import pytest
import torch

from pixelcnn_lit.likelihoods.categorical import Categorical
from pixelcnn_lit.likelihoods.logistic_mixture import LogisticMixture
from pixelcnn_lit.nn.ordinal import OrdinalRows


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def joint_by_hand(parameters: torch.Tensor, x: list[int], levels: int) -> float:
    """p(x) of one pixel by equations 1 to 3 of arXiv 1701.05517: parameters [D/K,K], a loop over the components."""
    channels, total = len(x), 0.0
    pairs = list(itertools.combinations(range(channels), 2))
    scaled = [2 * v / (levels - 1) - 1 for v in x]
    for k, weight in enumerate(parameters[0].softmax(0).tolist()):
        means, log_scales, slopes = parameters[1:, k].split([channels, channels, len(pairs)])
        mass = weight
        for c in range(channels):
            before = sum(math.tanh(slopes[pairs.index((b, c))]) * scaled[b] for b in range(c))
            mean, scale = float(means[c]) + before, math.exp(log_scales[c])
            upper = 1.0 if x[c] == levels - 1 else sigmoid((scaled[c] + 1 / (levels - 1) - mean) / scale)
            lower = 0.0 if x[c] == 0 else sigmoid((scaled[c] - 1 / (levels - 1) - mean) / scale)
            mass *= upper - lower
        total += mass
    return total


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 256), (2, 3), (3, 5), (3, 256), (4, 17)])
@torch.no_grad()
def test_the_channels_of_a_mixture_multiply_to_the_joint_of_the_paper(channels, levels):
    inside = LogisticMixture((channels, 1, 1), levels, n_mixtures=4).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        features = torch.randn(1, inside.out_channels, generator=generator, dtype=torch.float64) / 2
        x = torch.randint(levels, (1, channels), generator=generator, dtype=torch.uint8)
        conditionals = [inside.channel_logits(features, x, c)[0, int(x[0, c])] for c in range(channels)]
        parameters = features.reshape(-1, 4) + inside.start.double()
        by_hand = math.log(joint_by_hand(parameters, x[0].tolist(), levels))
        assert abs(float(sum(conditionals)) - by_hand) < 1e-9
        assert abs(float(inside.log_prob(features[..., None, None], x[..., None, None]).sum()) - by_hand) < 1e-9


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 256), (3, 2), (3, 256)])
def test_values_and_gradients_of_a_mixture_are_finite_at_extreme_features(channels, levels, size):
    """In float32, where a difference of two cumulative distributions is 0 a few scales away from the mean."""
    inside = LogisticMixture((channels, 8, 8), levels)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (4, inside.out_channels, 8, 8), generator=generator)
    x = torch.randint(levels, (4, channels, 8, 8), generator=generator, dtype=torch.uint8)
    x[:2] = torch.where(x[:2] > levels // 2, levels - 1, 0)  # edge bins
    asked = [inside.log_prob, *(lambda f, x, c=c: inside.channel_logits(f, x, c) for c in range(channels))]
    for function in asked:
        features = (signs * size).requires_grad_()
        values = function(features, x)
        (gradient,) = torch.autograd.grad(values.sum(), features)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def test_the_start_of_a_mixture_is_rounded_by_no_cast():
    inside = LogisticMixture((3, 8, 8), 256)
    before = inside.start.clone()
    assert torch.equal(inside.bfloat16().start, before)
    assert torch.equal(copy.deepcopy(inside).double().start, before)
    assert inside.to("meta").start.device.type == "meta"


@torch.no_grad()
def test_a_mixture_starts_with_mass_on_every_level():
    for levels, n_mixtures in itertools.product((2, 17, 256), (1, 10)):
        inside = LogisticMixture((1, 1, 1), levels, n_mixtures)
        p = inside.channel_logits(torch.zeros(1, inside.out_channels), torch.zeros(1, 1), 0).exp()
        assert p.min() > 0.3 / levels


def test_a_step_of_adam_moves_neighbouring_levels_together():
    """Level 100 was seen. Of free rows only its own goes up; of ordinal ones those beside it do, too."""
    head = Categorical((1, 4, 4), 256, width=8, ordinal=True).heads[0]
    torch.nn.init.zeros_(head.parametrizations.weight.original1)  # the smooth rows: all levels alike before
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    h = torch.ones(8)
    (-(head.weight @ h).log_softmax(0)[100]).backward()
    optimizer.step()
    moved = head.weight.detach() @ h
    assert moved[95:106].min() > moved.mean() + moved.std()


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_ordinal_rows_start_as_large_as_free_ones_and_smooth(levels):
    torch.manual_seed(0)
    rows, weight = OrdinalRows(levels), torch.randn(levels, 1000)
    free, smooth = rows.right_inverse(weight)
    assert free.shape == weight.shape
    assert not free.any()
    start = rows(free, smooth)
    assert abs(float(start.std()) - 1) < 0.1
    assert levels == 2 or start.diff(dim=0).std() < 0.7 * start.std()


def test_ordinal_rows_follow_weights_that_are_cast_alone():
    """As FSDP casts them."""
    free, smooth = torch.randn(17, 4).bfloat16(), torch.randn(16, 4).bfloat16()
    assert OrdinalRows(17)(free, smooth).dtype == torch.bfloat16


def test_without_ordinal_or_colour_logits_come_straight_from_the_network():
    for shape, colour in (((1, 4, 4), "autoregressive"), ((3, 4, 4), "independent")):
        inside = Categorical(shape, 17, colour)
        assert inside.out_channels == 17 * shape[0]
        assert not list(inside.parameters())
        assert Categorical(shape, 17, colour, width=8, ordinal=True).out_channels == 8 * shape[0]
