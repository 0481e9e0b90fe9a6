"""Sampling is a function of noise."""

import pytest
import torch
from test_laws import PAIRS, make

from pixelcnn_lit.noise import uniform
from pixelcnn_lit.samplers import inverse_cdf, naive


def test_noise_is_a_function_of_seed_and_number():
    assert torch.equal(uniform(0, 5, (1, 3, 3)), uniform(0, 5, (1, 3, 3)))
    assert uniform(0, 5, (1, 3, 3)).dtype == torch.float64
    assert not torch.equal(uniform(0, 5, (1, 3, 3)), uniform(5, 0, (1, 3, 3)))


def test_inverse_cdf_draws_each_level_as_often_as_its_probability():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = inverse_cdf(p.log().expand(1000, 4), u)
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 600, 300]


@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
def test_an_image_does_not_depend_on_its_batch_or_on_the_training_mode(network, likelihood):
    shape = (3, 4, 5)
    net, inside = make(network, likelihood, shape, levels=17)
    y = torch.tensor([0, 1, 2])
    three = naive(net, inside, y, shape, seed=7)
    assert torch.equal(naive(net, inside, y[:1], shape, seed=7, n_per_class=1), three[:1])
    assert torch.equal(naive(net, inside, y[:1], shape, seed=7), three[:1])
    net.train()
    assert torch.equal(naive(net, inside, y, shape, seed=7), three)
    assert net.training
    assert not torch.equal(naive(net, inside, y, shape, seed=8), three)


@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
@torch.no_grad()
def test_each_value_is_the_inverse_cdf_of_its_noise_given_the_finished_image(network, likelihood):
    """What sampling pixel by pixel drew, one look at the whole image confirms."""
    shape, temperature = (3, 4, 5), 0.7
    net, inside = make(network, likelihood, shape, levels=17)
    y = torch.tensor([2, 3])
    x = naive(net, inside, y, shape, seed=1, temperature=temperature)
    features = net(x, y)
    for n in range(2):
        u = uniform(1, n, shape)
        for c in range(3):
            logits = inside.channel_logits(features, x, c)[n].flatten(1).T / temperature  # [HW,V]
            assert torch.equal(inverse_cdf(logits, u[c].flatten()), x[n, c].flatten().long())
