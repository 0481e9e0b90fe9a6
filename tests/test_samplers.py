"""Sampling is a function of noise (law 5), whatever steers it."""

from contextlib import suppress
from dataclasses import replace
from itertools import chain, product

import pytest
import torch
from tiny import EACH_ONCE, NETWORKS, PAIRS, density, make, set_dropout

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.models.protocols import SteppableNetwork
from pixelcnn_lit.nn.noise import uniform
from pixelcnn_lit.nn.wavefronts import At, steps
from pixelcnn_lit.samplers.draw import Drawing, Request, _keys, draw
from pixelcnn_lit.samplers.pick import inverse_cdf, sharpened
from pixelcnn_lit.samplers.walk import GuidedModel, eval_mode, fixed_point

SHAPE = (3, 4, 5)
METHODS = ("naive", "cached", "fixed_point")
WITHOUT_TABLES = ("pixelcnn", "pixel_attention", "gated_pixelcnn")  # one for each way in which steps read the image


def drawn(model, y, image=None, known=None, watch=None, **own):
    """Images of the classes y, uint8 [B,C,H,W]."""
    return draw(Request(model, torch.tensor(y), image, known, watch), **own).flatten(0, 1)


def n_steps(model) -> int:
    """Of a network that steps, through an image."""
    _, height, width = model.image_shape
    return len(list(steps(height, width, model.stepper(torch.tensor([0])).skew)))


def test_noise_is_a_function_of_its_key():
    assert torch.equal(uniform((0, 5), (1, 3, 3)), uniform((0, 5), (1, 3, 3)))
    assert uniform((0, 5), (1, 3, 3)).dtype == torch.float64
    assert not torch.equal(uniform((0, 5), (1, 3, 3)), uniform((5, 0), (1, 3, 3)))


def test_the_noise_of_no_image_is_that_of_another_or_of_a_binarized_one():
    """numpy fills short keys up with zeros, and takes numbers beyond 32 bits for two."""
    y = torch.tensor([5, 0, 5])
    keys = [*_keys(y, 2, seed=0), *_keys(y, 2, seed=5), (0, 5)]
    noises = [uniform(key, (1, 2, 2)) for key in keys]
    assert len(torch.stack(noises).unique(dim=0)) == len(noises)


def test_inverse_cdf_draws_each_level_as_often_as_its_probability():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    levels = inverse_cdf(p.log().expand(1000, 4), u)
    assert levels.bincount(minlength=4).tolist() == [100, 0, 600, 300]


STEERED = [
    {"temperature": 0.6},
    {"guidance_scale": 2.5},
    {"mix_with": 3, "mix_weight": 0.3},
    {"top_k": 5, "top_p": 0.95},
    {"flip_mixture": True},
]


def check_law_5(network: str, likelihood: str, shape: tuple[int, int, int], y: list[int], **steer) -> None:
    model = make(network, likelihood, shape, levels=17, num_classes=4)
    naive, cached, fixed = (drawn(model, y, method=method, seed=7, **steer) for method in METHODS)
    assert torch.equal(naive, cached)
    assert torch.equal(naive, fixed)
    assert not torch.equal(naive, drawn(model, y, seed=8, **steer))


@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
def test_law_5_naive_cached_and_fixed_point_draw_the_same_image(network, likelihood):
    check_law_5(network, likelihood, SHAPE, [0, 1, 2])
    check_law_5(network, likelihood, (1, 8, 8), [3])


@pytest.mark.parametrize("steer", STEERED, ids=str)
@pytest.mark.parametrize(("network", "likelihood"), EACH_ONCE)
def test_law_5_holds_however_it_is_steered(network, likelihood, steer):
    """Steering changes logits, of which it does not know which network and likelihood they come from."""
    check_law_5(network, likelihood, SHAPE, [0, 1, 2], **steer)


@pytest.mark.parametrize(("network", "likelihood"), EACH_ONCE)
def test_an_image_does_not_depend_on_its_batch_or_on_the_training_mode(network, likelihood):
    model = make(network, likelihood, SHAPE, levels=17, num_classes=4)
    for method in METHODS:
        three = drawn(model.eval(), [0, 1, 2], seed=7, method=method)
        assert torch.equal(drawn(model, [1], seed=7, method=method), three[1:2])
        assert torch.equal(drawn(model, [2, 1], seed=7, n_per_class=2, method=method)[::2], three[[2, 1]])
        assert torch.equal(drawn(model, [0, 1, 2], seed=7, batch_size=2, method=method), three)
        model.train()
        set_dropout(model, 0.5)
        assert torch.equal(drawn(model, [0, 1, 2], seed=7, method=method), three)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("network", [*NETWORKS, *(f"{name} model.embedding.width=0" for name in WITHOUT_TABLES)])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_law_5_step_equals_forward(network, dtype, tolerance, on_device):
    """Along the same images, one after the other by one stepper; with the column as a number and on the device."""
    for shape in ((1, 7, 7), (3, 3, 5), (1, 4, 1), (3, 1, 6), (1, 19, 6)):
        model = make(network, "categorical", shape, levels=17, num_classes=4).to(dtype)
        net = model.network
        y, width = torch.tensor([0, 4]), shape[2]
        if not isinstance(net, SteppableNetwork) or (on_device and not net.stepper(y).replayable):
            pytest.skip("no step, or none that a CUDA graph could replay")
        stepper = net.stepper(y)
        for seed in range(2):
            x = torch.randint(17, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            embedded = model.embedding(x, dtype)
            features = net(embedded, y).flatten(2).permute(2, 0, 1)  # [HW,B,D]
            embedded = embedded.flatten(2).permute(2, 0, 1)
            previous = torch.full_like(embedded[:1], torch.nan)  # before the first pixel there is none: it is ignored
            for at in steps(*shape[1:], stepper.skew):
                told = at
                if on_device:
                    first = at.column == 0  # within a row, the numbers of the host are those of a graph's recording
                    told = replace(at if first else At.pixel(0, 1, width), column_on_device=torch.tensor([at.column]))
                error = stepper.step(previous.flatten(0, 1), told) - features[at.pixels].flatten(0, 1)
                assert error.abs().max() <= tolerance * features.abs().max()
                previous = embedded[at.pixels]


@pytest.mark.parametrize("size", [(7, 9), (28, 28), (5, 4), (9, 3), (1, 6), (6, 1)])
@pytest.mark.parametrize("skew", [1, 2, 4, 6, 28])
def test_wavefronts_hold_each_pixel_once_and_after_all_that_a_skew_promises(size, skew):
    height, width = size
    order = list(steps(height, width, skew))
    held = [torch.arange(height * width)[at.pixels].tolist() for at in order]
    assert sorted(chain.from_iterable(held)) == list(range(height * width))
    assert [at.position for at in order] == [pixels[-1] for pixels in held]
    when = {p: n for n, pixels in enumerate(held) for p in pixels}
    for p in range(height * width):
        i, j = divmod(p, width)
        assert held[when[p]] == [
            (i + r) * width + j - skew * r for r in range(-i, height - i) if 0 <= j - skew * r < width
        ]
        for earlier in range(p):
            up, right = i - earlier // width, earlier % width - j
            if right < skew * up:
                assert when[earlier] < when[p]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_with_a_skew_sees_no_pixel_of_its_own_wavefront_or_a_later_one(network):
    for size in ((9, 23), (6, 3)):
        model = make(network, "categorical", (1, *size), levels=17, num_classes=4)
        skew = model.stepper(torch.tensor([0])).skew if model.can_step else size[1]
        time = torch.arange(size[0])[:, None] * skew + torch.arange(size[1])
        for i, j in product(*map(range, size)):
            assert (time[model.network.receptive_field(i, j)] < time[i, j]).all()


@torch.no_grad()
def assert_is_its_inverse_cdf(model, x: torch.Tensor, y: list[int], seed: int, temperature: float = 1.0) -> None:
    """One look at finished images, the first of their classes, confirms what sampling pixel by pixel drew."""
    features = model.features(x, torch.tensor(y))
    for n, label in enumerate(y):
        u = uniform((seed, label, 0, 1), x.shape[1:])
        for c in range(x.shape[1]):
            logits = model.likelihood.channel_logits(features, x, c)[n].flatten(1).T / temperature  # [HW,V]
            assert torch.equal(inverse_cdf(logits, u[c].flatten()), x[n, c].flatten().long())


@pytest.mark.parametrize(("network", "likelihood"), EACH_ONCE)
def test_each_value_is_the_inverse_cdf_of_its_noise_given_the_finished_image(network, likelihood):
    model = make(network, likelihood, SHAPE, levels=17, num_classes=4)
    x = drawn(model, [2, 3], seed=1, temperature=0.7)
    assert_is_its_inverse_cdf(model, x, [2, 3], seed=1, temperature=0.7)


@torch.no_grad()
def test_guidance_and_mixing_do_what_they_say():
    model = make(NETWORKS[0], "categorical", SHAPE, levels=17, num_classes=4)
    y, no_class = torch.tensor([0, 1]), 4
    x = torch.randint(17, (2, *SHAPE), dtype=torch.uint8)

    def log_p(label: torch.Tensor) -> torch.Tensor:
        return model.likelihood.channel_logits(model.features(x, label), x, 1).double()

    def steered(**own) -> torch.Tensor:
        guided = GuidedModel(model, y, **own)
        return guided.logits(model.features(guided.rows(x), guided.y), x, 1).log_softmax(1)

    none, cond, three = log_p(torch.full_like(y, no_class)), log_p(y), log_p(torch.full_like(y, 3))
    assert torch.allclose(steered(guidance_scale=3.0), (none + 3 * (cond - none)).log_softmax(1))
    assert torch.allclose(steered(guidance_scale=0.0), none)
    assert torch.allclose(steered(mix_with=3, mix_weight=0.2).exp(), 0.8 * cond.exp() + 0.2 * three.exp())


def test_top_k_and_top_p_keep_the_likeliest_levels():
    p = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]], dtype=torch.float64)
    kept = lambda **own: sharpened(p.log(), 1.0, **own).exp().gt(0).nonzero()[:, 1].tolist()  # noqa: E731
    assert kept(top_k=2, top_p=1.0) == [1, 3]
    assert kept(top_k=None, top_p=0.6) == [1, 3]
    assert kept(top_k=None, top_p=0.66) == [1, 3, 4]
    assert kept(top_k=None, top_p=0.01) == [1]
    assert kept(top_k=9, top_p=1.0) == [0, 1, 2, 3, 4]


def test_guidance_of_a_model_that_never_saw_no_class_is_refused():
    model = make(NETWORKS[0], "categorical", SHAPE, levels=17, num_classes=4, label_dropout=0.0)
    for own, message in (({"guidance_scale": 2.0}, "label_dropout"), ({"mix_with": 4}, "mix_with=4")):
        with pytest.raises(UserError, match=message):
            drawn(model, [0], **own)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_known_pixels_stay_to_the_bit_and_are_what_the_others_follow(method, network):
    model = make(network, "categorical", SHAPE, levels=17, num_classes=4)
    image = torch.randint(2, (2, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 16
    known = (torch.arange(4 * 5) < 2 * 5 + 2).view(SHAPE[1:])  # two rows and the beginning of the third
    done = drawn(model, [0, 1], image=image, known=known, method=method)
    assert torch.equal(done[:, :, known], image[:, :, known])
    other = drawn(model, [0, 1], image=16 - image, known=known, method=method)  # white for black
    assert not torch.equal(done[:, :, ~known], other[:, :, ~known])
    free = drawn(model, [0, 1], method=method)
    again = drawn(model, [0, 1], image=free, known=known, method=method)
    assert torch.equal(again, free)  # its own beginning leads to its own end


def test_a_coin_mirrors_an_image_whatever_else_is_drawn():
    model = make("pixelcnn", "categorical", SHAPE, levels=17, num_classes=4)
    as_it_is, mixed = (drawn(model, [1], n_per_class=40, flip_mixture=flip) for flip in (False, True))
    mirrored = (mixed == as_it_is.flip(-1)).flatten(1).all(1)
    assert torch.equal(mixed, torch.where(mirrored[:, None, None, None], as_it_is.flip(-1), as_it_is))
    assert 8 < mirrored.sum() < 32
    assert torch.equal(drawn(model, [2, 1], n_per_class=3, batch_size=2, flip_mixture=True)[3:], mixed[:3])
    with pytest.raises(UserError, match="flip_mixture=true: pixels that are kept cannot be mirrored"):
        drawn(model, [1], image=as_it_is[:1], known=torch.ones(4, 5, dtype=torch.bool), flip_mixture=True)


@torch.no_grad()
def test_a_network_that_sees_the_future_has_no_fixed_point_in_time():
    model = make(NETWORKS[0], "categorical", (1, 2, 2), levels=2, num_classes=1)

    def features(x, y):
        seen = x.flip(-1, -2).double()  # the first pixel sees the last one
        return torch.cat([seen, 1 - seen], dim=1)

    model.features = features
    model.likelihood.channel_logits = lambda features, x, c: features
    canvas = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="not causal"):
        fixed_point(GuidedModel(model, torch.tensor([0])), lambda logits, c, pixels: logits.argmax(1), canvas)


def test_a_drawing_that_was_cut_off_continues_with_what_is_missing(tmp_path, monkeypatch):
    model, whole = make("pixelcnn", "categorical", SHAPE), Drawing.fill
    request = Request(model, torch.tensor([0, 2]), parts=tmp_path)
    own = {"n_per_class": 4, "batch_size": 2}
    plain = draw(replace(request, parts=None), **own)
    filled = []

    def fill(self, canvas, batch, watch=None):
        if len(filled) == 3:
            raise KeyboardInterrupt
        filled.append(batch.keys)
        whole(self, canvas, batch, watch)

    def batches_drawn(request, **changed):
        filled.clear()
        with suppress(KeyboardInterrupt):
            images = draw(request, **own | changed)
            assert changed or request.density is not model or torch.equal(images, plain)
        return len(filled)

    monkeypatch.setattr(Drawing, "fill", fill)
    assert batches_drawn(request) == 3
    damaged, *whole_ones = sorted(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-60])
    assert len(whole_ones) == 2
    assert batches_drawn(request) == 2, "the damaged one, and the one that was never drawn"
    assert batches_drawn(request) == 0
    others = ({"seed": 1}, {"temperature": 0.5}, {"guidance_scale": 2.0}, {"batch_size": 3}, {"flip_mixture": True})
    for other in others:
        assert batches_drawn(request, **other) == 3, other
    assert batches_drawn(replace(request, density=density("pixelcnn", "categorical", SHAPE, levels=3))) == 3


def test_walking_restores_the_mode_of_every_part():
    model = make(NETWORKS[0], "categorical", SHAPE, levels=17, num_classes=4)
    model.train()
    first = next(iter(model.network.children())).eval()
    with pytest.raises(KeyError), eval_mode(model):  # noqa: PT012
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert model.training
    assert not first.training


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_the_network_runs_once_a_pixel_or_wavefront_and_not_once_a_channel(network, monkeypatch):
    model = make(network, "categorical", SHAPE, levels=17, num_classes=4)
    calls = []

    def counted(function):
        return lambda *arguments: calls.append(1) or function(*arguments)

    expected = {"naive": 4 * 5}
    if model.can_step:
        stepper = model.stepper(torch.tensor([0]))
        expected["cached"] = (4 - 1) * stepper.skew + 5 if stepper.skew < 5 else 4 * 5
        monkeypatch.setattr(type(stepper.network), "step", counted(type(stepper.network).step))
    monkeypatch.setattr(model.network, "forward", counted(model.network.forward))
    for method, n in expected.items():
        calls.clear()
        drawn(model, [0], method=method)
        assert len(calls) == n


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_each_step_or_evaluation_is_watched(method, network):
    model = make(network, "categorical", SHAPE, levels=17, num_classes=4)
    seen = []
    done = drawn(model, [0, 1], method=method, batch_size=1, watch=lambda images: seen.append(images.clone()))
    assert all(images.shape == (2, 1, *SHAPE) for images in seen)
    stepwise = {"naive": 4 * 5} | ({"cached": n_steps(model)} if model.can_step else {})
    assert len(seen) == 2 * stepwise[method] if method in stepwise else 2 <= len(seen) <= 40
    assert torch.equal(seen[-1].flatten(0, 1), done)
    assert not seen[0][1].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_two_levels_and_no_class(network):
    model = make(network, "categorical", (1, 5, 4), levels=2, num_classes=4, conditional=False)
    three = [drawn(model, [4], method=m, n_per_class=3) for m in METHODS]
    assert all(torch.equal(images, three[0]) for images in three)
    assert set(three[0].unique().tolist()) <= {0, 1}
    for own in ({"mix_with": 0}, {"guidance_scale": 2.0}):
        with pytest.raises(UserError):
            drawn(model, [4], **own)


@pytest.mark.parametrize("network", NETWORKS)
def test_float32_draws_the_same_images_but_for_rounding_at_a_boundary(network):
    model = make(network, "categorical", (1, 8, 8), levels=17, num_classes=4)
    naive, cached, fixed = (drawn(model.float(), [0, 1], method=m) for m in METHODS)
    assert (naive == cached).float().mean() > 0.9
    assert (naive == fixed).float().mean() > 0.9


@pytest.mark.parametrize("network", NETWORKS)
def test_bf16_draws_almost_the_same_images_and_leaves_the_network_alone(network):
    model = make(network, "categorical", (1, 8, 8), levels=17, num_classes=4)
    exact, cached, fixed = (
        drawn(model.float(), [0, 1], n_per_class=8, **own)
        for own in ({}, {"bf16": True}, {"bf16": True, "method": "fixed_point"})
    )
    assert model.dtype == torch.float32
    assert (exact[:, :, 0] == cached[:, :, 0]).float().mean() > 0.7  # later pixels follow the earlier ones
    assert (exact[:, :, 0] == fixed[:, :, 0]).float().mean() > 0.7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@pytest.mark.parametrize("network", NETWORKS)
def test_law_5_on_a_gpu_where_steps_are_replayed(network):
    model = make(network, "categorical", SHAPE, levels=17, num_classes=4)
    on_cpu = drawn(model, [0, 1], n_per_class=3)
    for method in METHODS:
        request = Request(model.cuda(), torch.tensor([0, 1], device="cuda"))
        for own in ({}, {"batch_size": 4}):
            assert torch.equal(draw(request, n_per_class=3, method=method, **own).flatten(0, 1).cpu(), on_cpu)
    guided = draw(request, method="cached", guidance_scale=2.0)
    assert torch.equal(guided, draw(request, method="naive", guidance_scale=2.0))


@pytest.mark.parametrize("labels", [[0], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_law_5_at_the_size_of_mnist(network, labels):
    """Without the naive sampler, which is slow: in a causal network no other image is its own inverse CDF."""
    model = make(network, "categorical", (1, 28, 28), levels=256, num_classes=4)
    cached = drawn(model, labels, method="cached")
    assert_is_its_inverse_cdf(model, cached, labels, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("network", NETWORKS)
def test_law_5_at_the_size_of_mnist_by_every_method(network):
    labels = [1, 2, 3]
    model = make(network, "categorical", (1, 28, 28), levels=256, num_classes=4)
    naive, cached, fixed = (drawn(model, labels, method=method) for method in METHODS)
    assert torch.equal(naive, cached)
    assert torch.equal(naive, fixed)
