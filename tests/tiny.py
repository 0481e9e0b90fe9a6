"""Tiny networks, likelihoods and models of conf/, where new ones are found, and what holds for every network."""

import copy
import functools
import itertools

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrize

from pixelcnn_lit.data.datamodule import ImageData, image_data
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.command import CONF


def stems(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def variants() -> list[str]:
    """Each network as its yaml has it, and once more with two heads, where it has any."""
    found = []
    for name in stems("model"):
        config = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        found += [name] + [f"{name} model.n_heads=2"] * ("n_heads" in config)
    return found


NETWORKS = variants()
LIKELIHOODS = stems("likelihood")
PAIRS = list(itertools.product(NETWORKS, LIKELIHOODS))
# Each network and each likelihood at least once: enough wherever nothing that is tested couples the two.
EACH_ONCE = [
    (NETWORKS[n % len(NETWORKS)], LIKELIHOODS[n % len(LIKELIHOODS)])
    for n in range(max(len(NETWORKS), len(LIKELIHOODS)))
]


def configs(network: str, likelihood: str, n_residual: int = 1) -> dict[str, dict]:
    """The model and likelihood configs of conf/, the network 8 channels wide."""
    return copy.deepcopy(_configs(network, likelihood, n_residual))


@functools.cache
def _configs(network: str, likelihood: str, n_residual: int) -> dict[str, dict]:
    name, *overrides = network.split()
    sizes = ["model.hidden_channels=8", f"model.n_residual={n_residual}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"model={name}", f"likelihood={likelihood}", "model_size=tiny", *sizes, *overrides])
    return {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("model", "likelihood")}


OPTIMIZER = {"_target_": "torch.optim.adam.Adam"}


def make(network: str, likelihood: str, image_shape=(1, 4, 4), levels=3, num_classes=3, n_residual=1, **own) -> Density:
    """A tiny model of conf/ in float64 and eval mode, every parameter and buffer redrawn.

    It was trained with and without its class, if `own` settings do not say otherwise.
    """
    facts = {"image_shape": image_shape, "levels": levels, "num_classes": num_classes}
    facts |= {"class_names": [str(label) for label in range(num_classes)], "label_dropout": 0.1}
    model = Density(**configs(network, likelihood, n_residual) | facts | own).double()
    for part in (model.embedding, model.network, model.likelihood):
        redraw(part)
    return model.eval()


def density(network: str, likelihood: str, image_shape=(1, 4, 5), levels=17, n_residual=1, seed=0, **own) -> Density:
    """A tiny model of conf/ of three classes in float32 and eval mode, redrawn; `own` are its other settings."""
    facts = {"num_classes": 3, "class_names": ["a", "b", "c"], "dataset": {}}
    facts |= {"image_shape": list(image_shape), "levels": levels}
    model = Density(**configs(network, likelihood, n_residual) | facts | own)
    redraw(model, seed)
    return model.eval()


def module(*arguments, optimizer=OPTIMIZER, scheduler=None, compile=False, gradient_checkpointing=False, **own):
    """The DensityModule of such a model, for training."""
    settings = {"compile": compile, "gradient_checkpointing": gradient_checkpointing}
    return DensityModule(density(*arguments, **own), optimizer=optimizer, scheduler=scheduler, **settings).eval()


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
def check_no_future(model: Density) -> None:
    """Law 2 of a model of 17 levels and 3 classes: changing pixel q changes no feature at any p <= q, to the bit."""
    _, height, width = model.image_shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(17, (2, *model.image_shape), generator=generator, dtype=torch.uint8)
    y = torch.tensor([0, 2])
    before = model.features(x, y)
    for q in range(height * width):
        changed = x.clone()
        changed[:, :, q // width, q % width] = 16 - changed[:, :, q // width, q % width]
        changed[0, 0, q // width, q % width] = (x[0, 0, q // width, q % width] + 1) % 17  # 8 = 16 - 8 changes nothing
        after = model.features(changed, y)
        assert torch.equal(after.flatten(2)[..., : q + 1], before.flatten(2)[..., : q + 1]), f"pixel {q} was seen"


@torch.no_grad()
def check_receptive_field(model: Density) -> None:
    """Law 3 of a model of 17 levels on [1,7,7]: what some redraw shows to be seen is its network's receptive field."""
    x = torch.randint(17, (1, 1, 7, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    y = torch.tensor([1])
    # Image q of the batch has pixel q changed; compared at its own place in the batch, where rounding is the same.
    unchanged, y = x.repeat(49, 1, 1, 1), y.repeat(49)
    changed = unchanged.clone()
    for q in range(49):
        changed[q, 0, q // 7, q % 7] = (x[0, 0, q // 7, q % 7] + 8) % 17
    seen = torch.zeros(49, 49, dtype=torch.bool)  # [p, q]: some redraw shows that p depends on q
    for seed in range(5):
        redraw(model, seed)
        seen |= (model.features(changed, y) != model.features(unchanged, y)).any(1).flatten(1).T  # [B=q,D,H,W]
    for p in range(49):
        claimed = model.network.receptive_field(p // 7, p % 7).flatten()
        assert not claimed[p:].any()
        assert torch.equal(seen[p], claimed), f"pixel {p}: sees {seen[p].nonzero()}, claims {claimed.nonzero()}"
