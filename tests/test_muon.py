"""Muon: what a step is, on matrices whose singular vectors are known."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pixelcnn_lit.nn.layers import CausalConv2d
from pixelcnn_lit.optim.muon import Muon, orthogonal_factors

SHAPES = [(6, 6), (5, 40), (40, 5), (1, 7), (7, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (64, 384)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = torch.logspace(-2, 0, len(s), dtype=torch.float64)  # from 0.01 to 1
    inside = u.T @ orthogonal_factors([(u * spectrum @ vt)[None]])[0][0] @ vt.T
    values = inside.diagonal()
    assert (inside - values.diag()).abs().max() < 1e-9
    assert values.min() > 0.68
    assert values.max() < 1.21


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_formula(shape):
    """Three steps, with decay; a matrix of the same shape beside it changes nothing."""
    torch.manual_seed(0)
    lr, decay, momentum = 0.1, 0.3, 0.7
    w, beside = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(2))
    expected, average = w.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([w, beside], lr=lr, weight_decay=decay, momentum=momentum)
    for _ in range(3):
        w.grad, beside.grad = torch.randn(2, *shape, dtype=torch.float64).unbind()
        average = momentum * average + (1 - momentum) * w.grad
        ahead = (momentum * average + (1 - momentum) * w.grad).flatten(1)
        size = 0.2 * max(ahead.shape) ** 0.5
        expected = (1 - lr * decay) * expected - lr * size * orthogonal_factors([ahead[None]])[0][0].view(shape)
        given = w.grad.clone()
        optimizer.step()
        assert torch.equal(w.grad, given)
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-12)


def test_vectors_step_as_under_adamw():
    torch.manual_seed(0)
    ours = nn.LayerNorm(5)
    theirs = copy.deepcopy(ours)
    own: Any = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2}
    adamw = torch.optim.AdamW(theirs.parameters(), **own)
    muon = Muon([*ours.parameters(), nn.Parameter(torch.ones(2, 2))], **own)
    for _ in range(3):
        x = torch.randn(4, 5)
        for net, optimizer in ((ours, muon), (theirs, adamw)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_weights_stay_zero_and_a_matrix_without_gradient_stays():
    torch.manual_seed(0)
    conv, idle = CausalConv2d(3, 8, 3, "A"), nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([*conv.parameters(), idle], lr=0.1)
    before = conv.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
    live = conv.mask.expand_as(conv.weight).bool()
    assert (conv.weight[~live] == 0).all()
    assert (conv.weight[live] != before[live]).all()
    assert (idle == 1).all()


def test_without_a_gradient_in_a_matrix_it_decays_alone():
    w = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([w], lr=0.1, weight_decay=0.5)
    w.grad = torch.zeros(3, 4)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((3, 4), 0.95))


def test_a_closure_computes_the_gradients_and_its_loss_comes_back():
    w, vector = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3))
    optimizer = Muon([w, vector], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w.sum(1) + vector - 1).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (w > 0).all()
    assert (vector > 0).all()


def test_the_size_of_a_gradient_does_not_matter():
    steps = []
    for scale in (1.0, 1e-9):
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(4, 6))
        optimizer = Muon([w], lr=0.1)
        w.grad = torch.randn(4, 6) * scale
        optimizer.step()
        steps.append(w.detach())
    torch.testing.assert_close(steps[0], steps[1])


def test_gradients_scaled_for_fp16_are_unscaled_first():
    plain, scaled = nn.Linear(4, 6), nn.Linear(4, 6)
    scaled.load_state_dict(plain.state_dict())
    x, scaler = torch.randn(3, 4), torch.amp.GradScaler("cpu", init_scale=1024)
    for net in (plain, scaled):
        optimizer = Muon(net.parameters(), lr=0.1)
        loss = net(x).square().mean()
        (scaler.scale(loss) if net is scaled else loss).backward()
        scaler.step(optimizer) if net is scaled else optimizer.step()
        torch.testing.assert_close(net.weight.grad, plain.weight.grad)
        torch.testing.assert_close(list(net.parameters()), list(plain.parameters()))


def test_it_goes_on_from_its_saved_state_to_the_bit():
    def run(w: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            w.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    whole, cut = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    run(whole, Muon([whole]), range(6))
    first = Muon([cut])
    run(cut, first, range(3))
    second = Muon([cut])
    second.load_state_dict(first.state_dict())
    run(cut, second, range(3, 6))
    assert torch.equal(whole, cut)


def test_weights_that_are_spread_are_refused():
    with pytest.raises(ValueError, match="type optimizer=adamw"):
        Muon([nn.Parameter(torch.ones(5))])
