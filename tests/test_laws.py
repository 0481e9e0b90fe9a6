"""The laws every network and likelihood must keep. Both are found from conf/: nothing to edit here to add one."""

import copy
import itertools

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

from pixelcnn_lit.build import build
from pixelcnn_lit.command import CONF
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import DensityModel, load
from pixelcnn_lit.models.layers import CausalConv2d, LevelEmbedding, recompute_blocks

TOLERANCE = 1e-9


def stems(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def variants() -> list[str]:
    """Each network as its yaml has it, and once more for each norm that it offers, and with two heads."""
    found = []
    for name in stems("model"):
        config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        others = {"norm": "batch", "n_heads": 2}
        found += [name] + [f"{name} model.{key}={value}" for key, value in others.items() if key in config]
    return found


NETWORKS, LIKELIHOODS = variants(), stems("likelihood")
PAIRS = list(itertools.product(NETWORKS, LIKELIHOODS))
FACTS = {"num_classes": 3, "levels": 17, "class_names": [], "label": "", "dataset": {}}  # of a DensityModel


def configs(network: str, likelihood: str, n_residual: int = 1, conditional: bool = True) -> dict[str, dict]:
    """The model, likelihood and optimizer configs of conf/, the network 8 channels wide."""
    name, *overrides = network.split()
    sizes = [
        "model.hidden_channels=8",
        f"model.n_residual={n_residual}",
        f"model.conditional={str(conditional).lower()}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"model={name}", f"likelihood={likelihood}", "model_size=tiny", *sizes, *overrides])
    return {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("model", "likelihood", "optimizer")}


def make(
    network: str, likelihood: str, image_shape=(1, 4, 4), levels=3, num_classes=3, conditional=True, n_residual=1
) -> tuple[nn.Module, nn.Module]:
    """A tiny network and likelihood of conf/ in float64 and eval mode, every parameter and buffer redrawn."""
    config = configs(network, likelihood, n_residual, conditional)
    facts = {"image_shape": image_shape, "levels": levels}
    inside = build("likelihood", config["likelihood"], nn.Module, **facts)
    net = build("model", config["model"], nn.Module, num_classes=num_classes, out_channels=inside.out_channels, **facts)
    redraw(net.double()), redraw(inside.double())
    return net.eval(), inside.eval()


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0) -> None:
    """Parameters and BatchNorm statistics from a normal: fresh weights hide leaks behind zeros.

    Weights are scaled by their fan-in so that deep networks neither saturate nor vanish, and biases are small, so that
    it is not they that decide an image; masks stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 1.5 / fan_in**0.5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.normal_(generator=generator).square_().add_(0.5)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if parametrize.is_parametrized(layer, "weight"):
            layer.parametrizations.weight.original1 /= 8  # the size of ordinal rows' cosines


def every_image(image_shape: tuple[int, ...], levels: int) -> torch.Tensor:
    """All images of the shape and levels, uint8 [levels**CHW, C,H,W]."""
    values = itertools.product(range(levels), repeat=int(torch.tensor(image_shape).prod()))
    return torch.tensor(list(values), dtype=torch.uint8).reshape(-1, *image_shape)


@torch.no_grad()
def check_no_future(net: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Law 2 of a network of 17 levels and 3 classes: changing pixel q changes no feature at any p <= q, to the bit."""
    _, height, width = image_shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(17, (2, *image_shape), generator=generator, dtype=torch.uint8)
    y = torch.tensor([0, 2])
    before = net(x, y)
    for q in range(height * width):
        changed = x.clone()
        changed[:, :, q // width, q % width] = 16 - changed[:, :, q // width, q % width]
        changed[0, 0, q // width, q % width] = (x[0, 0, q // width, q % width] + 1) % 17  # 8 = 16 - 8 changes nothing
        after = net(changed, y)
        assert torch.equal(after.flatten(2)[..., : q + 1], before.flatten(2)[..., : q + 1]), f"pixel {q} was seen"


@torch.no_grad()
def check_context(net: nn.Module) -> None:
    """Law 3 of a network of 17 levels on [1,7,7]: the pixels that some redraw shows to be seen are `context`."""
    x = torch.randint(17, (1, 1, 7, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    y = torch.tensor([1])
    # Image q of the batch has pixel q changed; compared at its own place in the batch, where rounding is the same.
    unchanged, y = x.repeat(49, 1, 1, 1), y.repeat(49)
    changed = unchanged.clone()
    for q in range(49):
        changed[q, 0, q // 7, q % 7] = (x[0, 0, q // 7, q % 7] + 8) % 17
    seen = torch.zeros(49, 49, dtype=torch.bool)  # [p, q]: some redraw shows that p depends on q
    for seed in range(5):
        redraw(net, seed)
        seen |= (net(changed, y) != net(unchanged, y)).any(1).flatten(1).T  # [B=q,D,H,W] -> [p,q]
    for p in range(49):
        claimed = net.context(p // 7, p % 7).flatten()
        assert not claimed[p:].any()
        assert torch.equal(seen[p], claimed), f"pixel {p}: sees {seen[p].nonzero()}, claims {claimed.nonzero()}"


@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
@pytest.mark.parametrize(("image_shape", "levels"), [((1, 2, 3), 3), ((3, 1, 2), 3), ((3, 2, 2), 2)])
@torch.no_grad()
def test_law_1_the_probabilities_of_all_images_sum_to_one(network, likelihood, image_shape, levels):
    net, inside = make(network, likelihood, image_shape, levels)
    x = every_image(image_shape, levels)
    for label in (0, 2, 3):  # two classes, and none
        y = torch.full((len(x),), label)
        total = inside.log_prob(net(x, y), x).sum((1, 2, 3)).exp().sum()
        assert abs(total - 1) < TOLERANCE


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("image_shape", [(1, 7, 7), (3, 5, 6), (2, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_law_2_no_feature_sees_its_own_or_a_later_pixel(network, image_shape, mode):
    net, _ = make(network, LIKELIHOODS[0], image_shape, levels=17, n_residual=2)
    if mode == "train":
        if not net.train_is_likelihood:
            pytest.skip("its training-mode loss is not a likelihood, and it says so")
        net.train()
    check_no_future(net, image_shape)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_law_3_the_features_see_every_pixel_of_the_claimed_context(network):
    net, _ = make(network, LIKELIHOODS[0], (1, 7, 7), levels=17, n_residual=2)
    check_context(net)


@pytest.mark.parametrize("network", NETWORKS)
def test_law_3_the_context_is_every_earlier_pixel_where_there_is_no_blind_spot(network):
    """It is the network that says so; here it is deep enough for the image."""
    net, _ = make(network, LIKELIHOODS[0], (1, 7, 7), levels=17, n_residual=2)
    if not getattr(net, "no_blind_spot", False):
        pytest.skip("it claims no more than its context")
    for p in range(49):
        assert net.context(p // 7, p % 7).flatten().tolist() == [q < p for q in range(49)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (3, 5), (3, 256)])
@torch.no_grad()
def test_law_4_log_prob_is_channel_logits_at_the_value(likelihood, channels, levels):
    _, inside = make(NETWORKS[0], likelihood, (channels, 4, 4), levels)
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


@pytest.mark.parametrize(("network", "likelihood"), PAIRS)
@torch.no_grad()
def test_law_6_a_checkpoint_loaded_and_asked_again_gives_the_same_bits(network, likelihood, tmp_path):
    facts = {"image_shape": [3, 2, 2], "num_classes": 3, "levels": 5, "class_names": ["a", "b", "c"]}
    model = DensityModel(**configs(network, likelihood), **facts, label="none", dataset={}).eval()
    redraw(model)
    x, y = torch.randint(5, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(load(str(tmp_path / "x.ckpt")).nats(x, y), model.nats(x, y))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@torch.no_grad()
def test_bf16_features_are_raised_to_float32(likelihood):
    _, inside = make(NETWORKS[0], likelihood, (3, 4, 4), 256)
    features = torch.randn(2, inside.out_channels, 4, 4).bfloat16()
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert inside.bfloat16().log_prob(features, x).dtype == torch.float32
        assert inside.float().log_prob(features, x).dtype == torch.float32
        assert inside.double().log_prob(features.double(), x).dtype == torch.float64


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_the_class_matters_unless_unconditional(network):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for conditional in (True, False):
        net, _ = make(network, LIKELIHOODS[0], conditional=conditional)
        same = torch.equal(net(x, torch.tensor([0])), net(x, torch.tensor([1])))
        assert same != conditional


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_scaling_never_looks_at_the_data(network):
    """A black image beside a white one and alone: published code divides by 255 only `if x.max() > 1`."""
    net, _ = make(network, LIKELIHOODS[0], levels=256)
    dark, y = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([0])
    beside = net(torch.cat([dark, 255 * dark]), y.repeat(2))[:1]
    assert torch.allclose(net(dark, y), beside, atol=1e-12)


@pytest.mark.parametrize("width", [0, 3])
@torch.no_grad()
def test_a_level_is_read_as_its_number_and_as_its_row_of_the_table_of_its_channel(width):
    read, like = LevelEmbedding(2, 5, width), torch.zeros((), dtype=torch.float64)
    x = torch.randint(5, (2, 2, 3, 4), dtype=torch.uint8)
    channels = read(x, like)
    assert channels.dtype == torch.float64
    assert channels.shape == (2, read.out_channels, 3, 4)
    assert channels.is_contiguous()  # channels last would make them so in all convolutions, channels_last=false or not
    assert (channels[:, -1] == 1).all()
    for c, (number, *row) in enumerate(channels[:, :-1].unflatten(1, (2, -1)).movedim((1, 2), (0, 1))):
        assert torch.allclose(number, x[:, c].double() / 2 - 1)
        for k, column in enumerate(row):
            assert torch.equal(column, read.tables[c].weight[x[:, c].long(), k].double())
    assert torch.equal(read.reader(like)(x[..., 1, 2]), channels[..., 1, 2])
    with torch.autocast("cpu", torch.bfloat16):  # as in training, where the scores read the same rows without
        assert torch.equal(read(x, like), channels)


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
    net, _ = make(network, "categorical", (1, 7, 7), levels=17, n_residual=6)
    for dropout in [module for module in net.train().modules() if isinstance(module, nn.Dropout)]:
        dropout.p = 0.5
    again = copy.deepcopy(net)
    if not recompute_blocks(again):
        with pytest.raises(UserError, match="gradient_checkpointing=true"):
            DensityModel(**configs(network, "categorical"), **FACTS, image_shape=[1, 7, 7], gradient_checkpointing=True)
        return
    x, y = torch.randint(17, (2, 1, 7, 7), dtype=torch.uint8), torch.tensor([0, 2])
    kept, gradients = [], []
    for each in (net, copy.deepcopy(again)):  # an EMA copies the network, too
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = each(x, y).square().sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


COMPILED = [*((network, "categorical") for network in NETWORKS), ("pixelcnn_pp", "logistic_mixture")]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("network", "likelihood"), [*COMPILED, ("pixelcnn", "categorical_independent")])
def test_a_loss_compiles_into_one_graph_and_once(network, likelihood, gradient_checkpointing):
    own = {"image_shape": [3, 5, 7], "gradient_checkpointing": gradient_checkpointing, **FACTS}
    try:
        model = DensityModel(**configs(network, likelihood, n_residual=2), **own)
    except UserError:
        assert gradient_checkpointing
        pytest.skip("it has no blocks that can be computed twice")
    torch.compiler.reset()  # else torch counts the models of all these tests as one that is compiled again and again
    counter = CompileCounter()
    compiled = torch.compile(DensityModel.nats, backend=counter, fullgraph=True)
    for seed in range(3):
        x = torch.randint(17, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        compiled(model, x, torch.tensor([0, seed])).sum().backward()
    assert counter.frame_count == 1


def test_the_loss_of_training_alone_is_compiled(monkeypatch):
    """Scores, samples and the names of the weights are of the network as it is."""
    config = configs("pixelcnn", "categorical") | {"image_shape": [1, 4, 4], **FACTS}
    assert DensityModel(**config, compile=True).state_dict().keys() == DensityModel(**config).state_dict().keys()
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *batch: compiled.append(batch) or function(*batch))
    model = DensityModel(**config, compile=True)
    batch = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    model.validation_step(batch, 0)
    model.draw({"_target_": "pixelcnn_lit.samplers.draw", "n_per_class": 1})
    assert not compiled
    model.log = lambda *args, **own: None
    model.training_step(batch, 0).backward()
    assert len(compiled) == 1
