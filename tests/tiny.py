"""Tiny networks, likelihoods and models of conf/, where new ones are found, and what holds for every network."""

import copy
import functools
import itertools

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrize

from pixelcnn_lit.config.build import build
from pixelcnn_lit.data.datamodule import ImageData, image_data
from pixelcnn_lit.lit.density_module import DensityModel
from pixelcnn_lit.runs.command import CONF


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


NETWORKS = variants()
LIKELIHOODS = stems("likelihood")
PAIRS = list(itertools.product(NETWORKS, LIKELIHOODS))
# Each network and each likelihood at least once: enough wherever nothing that is tested couples the two.
EACH_ONCE = [
    (NETWORKS[n % len(NETWORKS)], LIKELIHOODS[n % len(LIKELIHOODS)])
    for n in range(max(len(NETWORKS), len(LIKELIHOODS)))
]


def configs(network: str, likelihood: str, n_residual: int = 1, conditional: bool = True) -> dict[str, dict]:
    """The model, likelihood and optimizer configs of conf/, the network 8 channels wide."""
    return copy.deepcopy(_configs(network, likelihood, n_residual, conditional))


@functools.cache
def _configs(network: str, likelihood: str, n_residual: int, conditional: bool) -> dict[str, dict]:
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


def density(
    network: str, likelihood: str, image_shape=(1, 4, 5), levels=17, n_residual=1, conditional=True, seed=0, **own
) -> DensityModel:
    """A tiny DensityModel of conf/ of three classes, in eval mode, redrawn; `own` are its other settings."""
    facts = {"num_classes": 3, "class_names": ["a", "b", "c"], "label": "", "dataset": {}}
    facts |= {"image_shape": list(image_shape), "levels": levels}
    model = DensityModel(**configs(network, likelihood, n_residual, conditional) | facts | own)
    redraw(model, seed)
    return model.eval()


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
        if parametrize.is_parametrized(layer, "weight"):
            layer.parametrizations.weight.original1 /= 8  # the size of ordinal rows' cosines
    set_dropout(module, 0.0)


def set_dropout(module: nn.Module, p: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = p


def open_data(*overrides: str, seed: int = 0) -> ImageData:
    """The data of conf/, the digits if nothing else is asked for."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("data", list(overrides)).dataset
    data = image_data(OmegaConf.to_container(config, resolve=True), seed)
    data.setup()
    return data


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
