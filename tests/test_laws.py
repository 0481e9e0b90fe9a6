"""The laws every network and likelihood must keep. Both are found from conf/: nothing to edit here to add one."""

import copy
import itertools
import math

import lightning as L
import pytest
import torch
from tiny import (
    EACH_ONCE,
    LIKELIHOODS,
    NETWORKS,
    PAIRS,
    check_no_future,
    check_receptive_field,
    density,
    make,
    module,
    set_dropout,
)
from torch._dynamo.testing import CompileCounter

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.nn.embeddings import LevelEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, checkpoint_blocks
from pixelcnn_lit.nn.wavefronts import At

TOLERANCE = 1e-9


def every_image(image_shape: tuple[int, ...], levels: int) -> torch.Tensor:
    """All images of the shape and levels, uint8 [levels**CHW, C,H,W]."""
    values = itertools.product(range(levels), repeat=int(torch.tensor(image_shape).prod()))
    return torch.tensor(list(values), dtype=torch.uint8).reshape(-1, *image_shape)


GREY, COLOURS, SMALL = ((1, 2, 3), 3), ((3, 2, 2), 2), ((3, 1, 2), 3)  # an image's shape and its levels


@pytest.mark.parametrize(
    ("network", "likelihood", "image_shape", "levels"),
    [(*pair, *SMALL) for pair in PAIRS] + [(*pair, *size) for pair in EACH_ONCE for size in (GREY, COLOURS)],
)
@torch.no_grad()
def test_law_1_the_probabilities_of_all_images_sum_to_one(network, likelihood, image_shape, levels):
    model = make(network, likelihood, image_shape, levels)
    x = every_image(image_shape, levels)
    for label in (0, 2, 3):  # two classes, and none
        y = torch.full((len(x),), label)
        total = (-model(x, y)).exp().sum()
        assert abs(total - 1) < TOLERANCE


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_law_1_of_a_mixture_with_mirror_images(likelihood):
    model = make("pixelcnn", likelihood, *SMALL)
    x = every_image(*SMALL)
    y = torch.full((len(x),), 2)
    mixed = model.nats(x, y, flip_mixture=True)
    assert abs((-mixed).exp().sum() - 1) < TOLERANCE
    assert torch.allclose(mixed, model.nats(x.flip(-1), y, flip_mixture=True), rtol=1e-12)
    assert not torch.allclose(mixed, model.nats(x, y), rtol=1e-3)
    assert (mixed <= model.nats(x, y) + math.log(2)).all()


@torch.no_grad()
def test_law_1_of_a_model_that_was_told_poses():
    model = make("pixelcnn", "categorical", *SMALL, poses=8)
    assert model.known_classes == [0, 1, 2, 24]
    x = every_image(*SMALL)
    sums = [(-model(x, torch.full((len(x),), told))).exp().sum() for told in range(25)]  # of each class in each pose
    assert max(abs(total - 1) for total in sums) < TOLERANCE
    assert model.sample(classes=[2, 24], guidance_scale=2.0).shape == (2, 1, 3, 1, 2)
    with pytest.raises(UserError, match="24 \\(which stands for no class\\)"):
        model.sample(classes=[3])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("image_shape", [(1, 7, 7), (3, 5, 6), (3, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_law_2_no_feature_sees_its_own_or_a_later_pixel(network, image_shape, mode):
    model = make(network, LIKELIHOODS[0], image_shape, levels=17, n_residual=2)
    if mode == "train":
        if not model.network.train_is_likelihood:
            pytest.skip("its training-mode loss is not a likelihood, and it says so")
        model.train()
    check_no_future(model)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_law_3_the_features_see_every_pixel_of_the_receptive_field(network):
    model = make(network, LIKELIHOODS[0], (1, 7, 7), levels=17, n_residual=2)
    check_receptive_field(model)


@pytest.mark.parametrize("network", NETWORKS)
def test_law_3_the_receptive_field_is_every_earlier_pixel_where_there_is_no_blind_spot(network):
    """It is the network that says so; here it is deep enough for the image."""
    model = make(network, LIKELIHOODS[0], (1, 7, 7), levels=17, n_residual=2)
    if not getattr(model.network, "no_blind_spot", False):
        pytest.skip("it claims no more than its receptive field")
    for p in range(49):
        assert model.network.receptive_field(p // 7, p % 7).flatten().tolist() == [q < p for q in range(49)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (3, 5), (3, 256)])
@torch.no_grad()
def test_law_4_log_prob_is_channel_logits_at_the_value(likelihood, channels, levels):
    inside = make(NETWORKS[0], likelihood, (channels, 4, 4), levels).likelihood
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, inside.out_channels, 4, 4, generator=generator, dtype=torch.float64)
    x = torch.randint(levels, (2, channels, 4, 4), generator=generator, dtype=torch.uint8)
    log_prob = inside.log_prob(features, x)
    for c in range(channels):
        logits = inside.channel_logits(features, x, c)
        assert torch.allclose(logits.exp().sum(1), torch.ones(2, 4, 4, dtype=torch.float64), atol=TOLERANCE)
        assert torch.allclose(logits.gather(1, x[:, c, None].long())[:, 0], log_prob[:, c], rtol=0, atol=TOLERANCE)
        pixel = inside.channel_logits(features[:, :, 1, 2], x[:, :, 1, 2], c)
        assert torch.allclose(pixel, logits[:, :, 1, 2], atol=1e-12)


@pytest.mark.parametrize(("network", "likelihood"), EACH_ONCE)
@torch.no_grad()
def test_law_6_a_checkpoint_loaded_and_asked_again_gives_the_same_bits(network, likelihood, tmp_path):
    model = density(network, likelihood, (3, 2, 2), levels=5, label_dropout=0.1)
    x, y = torch.randint(5, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(DensityModule(model))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(load(str(tmp_path / "x.ckpt")).nats(x, y), model.nats(x, y))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@torch.no_grad()
def test_bf16_features_are_raised_to_float32(likelihood):
    model = make(NETWORKS[0], likelihood, (3, 4, 4), 256).float()
    features = torch.randn(2, model.likelihood.out_channels, 4, 4).bfloat16()
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    model.features = lambda x, y: features
    with torch.autocast("cpu", torch.bfloat16):
        in_training = model.log_prob(x, torch.tensor([0, 1]))
    inside = model.likelihood
    assert in_training.dtype == torch.float32
    assert torch.equal(in_training, inside.log_prob(features, x))
    assert inside.bfloat16().log_prob(features, x).dtype == torch.float32
    assert inside.double().log_prob(features.double(), x).dtype == torch.float64


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_the_class_matters_unless_unconditional(network):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for conditional in (True, False):
        model = make(network, LIKELIHOODS[0], conditional=conditional)
        same = torch.equal(model.features(x, torch.tensor([0])), model.features(x, torch.tensor([1])))
        assert same != conditional


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_scaling_never_looks_at_the_data(network):
    """A black image beside a white one and alone: published code divides by 255 only `if x.max() > 1`."""
    model = make(network, LIKELIHOODS[0], levels=256)
    dark, y = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([0])
    beside = model.features(torch.cat([dark, 255 * dark]), y.repeat(2))[:1]
    assert torch.allclose(model.features(dark, y), beside, atol=1e-12)


@pytest.mark.parametrize("width", [0, 3])
@torch.no_grad()
def test_a_level_is_read_as_its_number_and_as_its_row_of_the_table_of_its_channel(width):
    read, dtype = LevelEmbedding(2, 5, width), torch.float64
    x = torch.randint(5, (2, 2, 3, 4), dtype=torch.uint8)
    channels = read(x, dtype)
    assert channels.dtype == torch.float64
    assert channels.shape == (2, read.out_channels, 3, 4)
    assert channels.is_contiguous()  # channels last would make them so in all convolutions, channels_last=false or not
    assert (channels[:, -1] == 1).all()
    for c, (number, *row) in enumerate(channels[:, :-1].unflatten(1, (2, -1)).movedim((1, 2), (0, 1))):
        assert torch.allclose(number, x[:, c].double() / 2 - 1)
        for k, column in enumerate(row):
            assert torch.equal(column, read.tables[c].weight[x[:, c].long(), k].double())
    stepped = read.stepper(dtype, x.device)(x[..., 1, 2], At.pixel(1, 2, width=4))
    assert torch.equal(stepped, channels[..., 1, 2])
    with torch.autocast("cpu", torch.bfloat16):  # as in training, where the scores read the same rows without
        assert torch.equal(read(x, dtype), channels)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_masked_weights_never_leave_zero(mask_type):
    """Published code multiplies weight.data in forward: masked weights get gradients, and leak until the next one."""
    layer = CausalConv2d(2, 3, 5, mask_type)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    assert (layer.mask == 0).any()
    for masked in (layer.weight.grad * (1 - layer.mask), layer.weight * (1 - layer.mask)):
        assert not masked.any()


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(network):
    model = make(network, "categorical", (1, 7, 7), levels=17, n_residual=6)
    set_dropout(model.train(), 0.5)
    again = copy.deepcopy(model)
    if not checkpoint_blocks(again):
        with pytest.raises(UserError, match="gradient_checkpointing=true"):
            module(network, "categorical", gradient_checkpointing=True)
        return
    x, y = torch.randint(17, (2, 1, 7, 7), dtype=torch.uint8), torch.tensor([0, 2])
    kept, gradients = [], []
    for each in (model, copy.deepcopy(again)):  # an EMA copies the network, too
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = each.features(x, y).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in each.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


FEW = EACH_ONCE[-len(LIKELIHOODS) :]
REST = [pytest.param(*pair, marks=pytest.mark.long) for pair in EACH_ONCE if pair not in FEW]


@pytest.mark.parametrize("gradient_checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(("network", "likelihood"), [*FEW, *REST])
def test_a_loss_compiles_into_one_graph_and_once(network, likelihood, gradient_checkpointing):
    own = {"n_residual": 2, "gradient_checkpointing": gradient_checkpointing}
    try:
        model = module(network, likelihood, (3, 5, 7), **own).density.train()
    except UserError:
        assert gradient_checkpointing
        pytest.skip("it has no blocks that can be computed twice")
    set_dropout(model, 0.1)
    torch.compiler.reset()  # else torch counts the models of all these tests as one that is compiled again and again
    counter = CompileCounter()
    compiled = torch.compile(Density.forward, backend=counter, fullgraph=True)
    for seed in range(3):
        x = torch.randint(17, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        compiled(model, x, torch.tensor([0, seed])).sum().backward()
    assert counter.frame_count == 1


def test_the_loss_of_training_alone_is_compiled(monkeypatch):
    """Scores, samples and the names of the weights are of the network as it is."""
    plain = density("pixelcnn", "categorical")
    assert module("pixelcnn", "categorical", compile=True).density.state_dict().keys() == plain.state_dict().keys()
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *batch: compiled.append(batch) or function(*batch))
    model = module("pixelcnn", "categorical", compile=True)
    batch = torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    model.validation_step(batch, 0)
    model.density.sample()
    assert not compiled
    model.log = lambda *args, **own: None
    model.training_step(batch, 0).backward()
    assert len(compiled) == 1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@torch.no_grad()
def test_a_likelihood_makes_all_tensors_where_the_features_are(likelihood):
    """As on a GPU, without one: a tensor that is made without a device would be on another than the features."""
    inside = make(NETWORKS[0], likelihood, (3, 4, 4), 17).likelihood
    features = torch.randn(2, inside.out_channels, 4, 4, dtype=torch.float64)
    x = torch.randint(17, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.device("meta"):
        assert inside.log_prob(features, x).device.type == "cpu"
        assert inside.channel_logits(features, x, 2).device.type == "cpu"
