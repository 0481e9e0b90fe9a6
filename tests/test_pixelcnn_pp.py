"""PixelCNN++ with more blocks than the laws give it: at each of its six stages, two with short-cuts, and an odd one."""

import pytest
import torch
from tiny import check_no_future, check_receptive_field, make

from pixelcnn_lit.models.pixelcnn_pp import concat_elu
from pixelcnn_lit.nn.wavefronts import steps


@pytest.mark.parametrize("n_residual", [3, 6, 13])
def test_no_stage_sees_the_future(n_residual):
    for image_shape in ((1, 9, 6), (3, 4, 5), (1, 1, 9), (1, 6, 1)):
        model = make("pixelcnn_pp", "categorical", image_shape, levels=17, n_residual=n_residual)
        check_no_future(model)


@pytest.mark.parametrize("n_residual", [1, 3, 13])
def test_the_receptive_field_is_what_is_seen(n_residual):
    model = make("pixelcnn_pp", "categorical", (1, 7, 7), levels=17, n_residual=n_residual)
    check_receptive_field(model)


def test_from_two_blocks_on_every_earlier_pixel_of_a_small_image_is_seen():
    for n_residual in (2, 5, 6):
        model = make("pixelcnn_pp", "categorical", (1, 8, 8), levels=17, n_residual=n_residual)
        earlier = torch.ones(64, 64).tril(-1).bool()
        seen = torch.stack([model.network.receptive_field(p // 8, p % 8).flatten() for p in range(64)])
        assert torch.equal(seen, earlier)


@pytest.mark.parametrize("n_residual", [1, 2, 5, 6, 13])
def test_every_parameter_is_trained(n_residual):
    model = make("pixelcnn_pp", "categorical", (1, 5, 6), levels=17, n_residual=n_residual)
    x = torch.randint(17, (2, 1, 5, 6), dtype=torch.uint8)
    model.features(x, torch.tensor([0, 1])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.network.parameters())


@pytest.mark.parametrize("n_residual", [2, 6, 13])
@torch.no_grad()
def test_step_equals_forward_at_every_stage(n_residual):
    for shape in ((1, 9, 6), (3, 5, 9), (1, 1, 3), (1, 6, 1)):
        model = make("pixelcnn_pp", "categorical", shape, levels=17, n_residual=n_residual)
        y = torch.tensor([0, 3])
        stepper = model.stepper(y)
        for seed in range(2):  # the second image starts from used caches
            x = torch.randint(17, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            features, previous = model.features(x, y), x[:, :, 0, 0]
            for at in steps(*shape[1:], skew=shape[2]):
                error = stepper.step(previous, at) - features[:, :, at.row, at.column]
                assert error.abs().max() <= 1e-12 * features.abs().max()
                previous = x[:, :, at.row, at.column]


def test_compiled_concat_elu_is_the_same():
    x = torch.tensor([[-50.0, -1.0, -1e-9, -0.0, 0.0, 1e-9, 2.0, 50.0]], dtype=torch.float64)
    weights = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of = []
    for function in (concat_elu, torch.compile(concat_elu, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y * weights).sum().backward()
        of.append((y.detach(), leaf.grad))
    for eager, compiled in zip(*of, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-15)
