"""Networks of several resolutions with more blocks than the laws give them: at each of six stages, and an odd one."""

import pytest
import torch
from tiny import check_no_future, check_receptive_field, make

from pixelcnn_lit.models.causal_unet import CausalUNet
from pixelcnn_lit.nn.wavefronts import steps

BOTH = pytest.mark.parametrize("network", ["pixelcnn_pp", "causal_unet"])


@BOTH
@pytest.mark.parametrize("n_residual", [3, 6, 13])
def test_no_stage_sees_the_future(network, n_residual):
    for image_shape in ((1, 9, 6), (3, 4, 5), (1, 1, 9), (1, 6, 1)):
        check_no_future(make(network, "categorical", image_shape, levels=17, n_residual=n_residual))


@BOTH
@pytest.mark.parametrize("n_residual", [1, 3, 13])
def test_the_receptive_field_is_what_is_seen(network, n_residual):
    check_receptive_field(make(network, "categorical", (1, 7, 7), levels=17, n_residual=n_residual))


@pytest.mark.parametrize(("size", "most"), [((9, 4), 0), ((28, 28), 136), ((32, 32), 160)])
def test_the_causal_unet_misses_as_many_pixels_as_it_says(size, most):
    net = CausalUNet(size, 1, 1, 1, hidden_channels=1, n_residual=6)
    places = torch.cartesian_prod(*(torch.arange(n) for n in size)).tolist()
    assert max(i * size[1] + j - int(net.receptive_field(i, j).sum()) for i, j in places) == most


@pytest.mark.parametrize("n_residual", [2, 5, 6])
def test_pixelcnn_pp_sees_every_earlier_pixel_of_a_small_image_from_two_blocks_on(n_residual):
    model = make("pixelcnn_pp", "categorical", (1, 8, 8), levels=17, n_residual=n_residual)
    earlier = torch.ones(64, 64).tril(-1).bool()
    seen = torch.stack([model.network.receptive_field(p // 8, p % 8).flatten() for p in range(64)])
    assert torch.equal(seen, earlier)


@BOTH
@pytest.mark.parametrize("n_residual", [1, 2, 5, 6, 13])
def test_every_parameter_is_trained(network, n_residual):
    model = make(network, "categorical", (1, 5, 6), levels=17, n_residual=n_residual)
    x = torch.randint(17, (2, 1, 5, 6), dtype=torch.uint8)
    model.features(x, torch.tensor([0, 1])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.network.parameters())


@BOTH
@pytest.mark.parametrize("n_residual", [2, 6, 13])
@torch.no_grad()
def test_step_equals_forward_at_every_stage(network, n_residual):
    for shape in ((1, 9, 6), (3, 5, 9), (1, 1, 3), (1, 6, 1)):
        model = make(network, "categorical", shape, levels=17, n_residual=n_residual)
        y = torch.tensor([0, 3])
        stepper = model.stepper(y)
        for seed in range(2):  # the second image starts from used caches
            x = torch.randint(17, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            features, previous = model.features(x, y), x[:, :, 0, 0]
            for at in steps(*shape[1:], skew=shape[2]):
                error = stepper.step(previous, at) - features[:, :, at.row, at.column]
                assert error.abs().max() <= 1e-12 * features.abs().max()
                previous = x[:, :, at.row, at.column]
