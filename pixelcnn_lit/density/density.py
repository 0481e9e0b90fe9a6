"""A density: an embedding, a network and a likelihood, which together are log p(x | y) of images. Plain torch."""

import json
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Annotated, Any, TypeGuard, TypeVar

import torch
from annotated_types import Interval
from torch import Tensor, nn

from pixelcnn_lit.checkpoints.safetensors import digest
from pixelcnn_lit.config.build import build, inspect_config
from pixelcnn_lit.config.errors import UserError, printable
from pixelcnn_lit.density.bayes import even_mixture, posterior
from pixelcnn_lit.models.protocols import Embedding, Likelihood, Network, SteppableNetwork, Stepper
from pixelcnn_lit.nn.layers import checkpoint_blocks
from pixelcnn_lit.nn.levels import MOST_CHANNELS, level_dtype
from pixelcnn_lit.nn.wavefronts import At
from pixelcnn_lit.runs.machine import on_threads
from pixelcnn_lit.runs.terminal import progress
from pixelcnn_lit.samplers.draw import Request, refuse_steering
from pixelcnn_lit.samplers.walk import eval_mode

SAMPLER = "pixelcnn_lit.samplers.draw.draw"


Nats = TypeVar("Nats", float, Tensor)


def bits(nats: Nats) -> Nats:
    """Nats to bits: the one line where the unit changes."""
    return nats / math.log(2)


class Density(nn.Module):
    """log p(x | y) of images, as a sum over pixels and channels in raster order.

    All arguments are plain values, and stored in a checkpoint, from which `pixelcnn_lit.load` makes it again.

    Args:
        model, likelihood: configs of the network, with its `embedding`, and of what happens inside a pixel.
        image_shape, num_classes, levels, class_names: facts of the data.
        label: the name of the data it was trained on, with all that was changed in it.
        dataset: config of that data.
        conditional: false means that every image comes without its class.
        label_dropout: share of training images that came without it.
        poses: in how many the training images came, told to the network as class + num_classes pose (conditional
            augmentation: Jun et al. 2020, Distribution Augmentation for Generative Modeling, section 3). What is scored
            or drawn is in pose 0.

    Example:
        >>> import pixelcnn_lit
        >>> model = pixelcnn_lit.load("mnist")
        >>> model.sample(classes=[3], n_per_class=2, seed=0).shape
        torch.Size([1, 2, 1, 28, 28])
    """

    TITLE = "density model"
    IDENTITY = ("model", "likelihood", "conditional")  # what makes it, beside the facts of the data

    likelihood: Likelihood
    embedding: Embedding
    network: Network

    def __init__(
        self,
        *,
        model: dict[str, Any],
        likelihood: dict[str, Any],
        image_shape: Sequence[int],
        num_classes: int,
        levels: int,
        class_names: list[str],
        label: str = "",
        dataset: dict[str, Any] | None = None,
        conditional: bool = True,
        label_dropout: Annotated[float, Interval(ge=0, le=1)] = 0.0,
        poses: Annotated[int, Interval(ge=1, le=8)] = 1,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if not 1 <= channels <= MOST_CHANNELS:  # an untrusted file may ask for a table or a head for each of a billion
            raise UserError(f"image_shape={list(image_shape)}: must begin with 1 to {MOST_CHANNELS} channels")
        facts = {"image_shape": [channels, height, width], "num_classes": num_classes, "levels": levels}
        own = {"model": model, "likelihood": likelihood, "conditional": conditional, "label_dropout": label_dropout}
        own |= {"poses": poses, "class_names": class_names, "label": label, "dataset": dataset}
        self.settings: dict[str, Any] = facts | own  # what makes it again, as plain values
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        self.num_classes = num_classes
        self.levels = levels
        self.class_names = [printable(name) for name in class_names]  # of a file that may be untrusted
        self.label = printable(label)
        self.conditional = conditional
        self.label_dropout = label_dropout
        self.no_class = num_classes * poses  # the last row of the network's table
        if poses > 1 and not conditional:
            raise UserError(f"dataset.poses={poses}: is told with the class; type conditional=true, or dataset.poses=1")
        self.dims = channels * height * width
        network = dict(model)
        embedding = network.pop("embedding", None)
        if embedding is None:
            raise UserError(
                "model.embedding is missing; put it into the model's yaml, as in conf/model/pixelcnn.yaml, or type "
                "+model.embedding._target_=pixelcnn_lit.nn.embeddings.LevelEmbedding"
            )
        self.likelihood = build("likelihood", likelihood, nn.Module, image_shape=self.image_shape, levels=levels)
        self.embedding = build("model.embedding", embedding, nn.Module, channels=channels, levels=levels)
        self.network = build(
            "model",
            network,
            nn.Module,
            image_size=(height, width),
            in_channels=self.embedding.out_channels,
            num_classes=self.no_class,
            out_channels=self.likelihood.out_channels,
        )
        if not isinstance(self.network, Network):
            raise UserError(
                f"model: {model['_target_']} needs train_is_likelihood and receptive_field, as Network in "
                "pixelcnn_lit/models/protocols.py says"
            )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def uniform_bits(self) -> float:
        """The bits of a pixel to a uniform model: channels times log2 of the levels."""
        return self.image_shape[0] * math.log2(self.levels)

    @property
    def level_dtype(self) -> torch.dtype:
        """In which its images are: int32 where uint8 cannot hold the levels."""
        return level_dtype(self.levels)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes, where no autocast changes it."""
        return next(self.network.parameters()).dtype

    @property
    def classes(self) -> list[int]:
        """The classes to draw: all of them, or "no class" alone for an unconditional model."""
        return list(range(self.num_classes)) if self.conditional else [self.no_class]

    @property
    def known_classes(self) -> list[int]:
        """The classes it was trained on; `no_class` where the class was hidden from it at times."""
        return self.classes + [self.no_class] * (self.conditional and self.label_dropout > 0)

    def called(self, classes: Sequence[int]) -> list[str]:
        """Return the names of classes that are given by number."""
        return ["no class" if one == self.no_class else self.class_names[one] for one in classes]

    def class_numbers(self, classes: Sequence[int | str], setting: str = "classes") -> list[int]:
        """Return the numbers of classes that are given by name or, where none has that name, by number.

        Raises UserError, which names the `setting`, unless the model was trained on them.
        """
        if isinstance(classes, str | int):
            raise UserError(f"{setting}: {classes!r}; give a list of classes")
        given = classes.tolist() if isinstance(classes, Tensor) else classes
        names = self.class_names
        numbers: list[Any] = [names.index(str(one)) if str(one) in names else one for one in given]
        self._require_known(numbers, given, setting)
        return numbers

    def _require_known(self, numbers: Sequence[object], given: Sequence[object], setting: str) -> None:
        """Raise UserError, which names the first that is wrong as it was given, unless the model knows all of them."""
        known = self.known_classes
        wrong = [
            one for number, one in zip(numbers, given, strict=True) if not _is_whole(number) or number not in known
        ]
        if numbers and not wrong:
            return
        called = {n: name if name == str(n) else f"{name} ({n})" for n, name in enumerate(self.class_names)}
        called[self.no_class] = f"{self.no_class} (which stands for no class)"
        trained_on = ", ".join(called[n] for n in known) if self.conditional else "no classes"
        raise UserError(f"{setting}={wrong[0] if wrong else '[]'}: this model was trained on {trained_on}")

    def features(self, x: Tensor, y: Tensor) -> Tensor:
        """Levels [B,C,H,W] and classes int64 [B] -> what the network knows of each pixel, [B,D,H,W]."""
        return self.network(self.embedding(x, self.dtype), self._heard(y))

    @property
    def can_step(self) -> bool:
        """Whether the network is one that steps."""
        return isinstance(self.network, SteppableNetwork)

    def stepper(self, y: Tensor) -> "DensityStepper":
        """Return what computes `features` step by step for the classes y [B], if the network can step."""
        assert isinstance(self.network, SteppableNetwork)
        return DensityStepper(self.embedding.stepper(self.dtype, y.device), self.network.stepper(self._heard(y)))

    def _heard(self, y: Tensor) -> Tensor:
        """The classes as the network is told of them."""
        return y if self.conditional else torch.full_like(y, self.no_class)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(x | y) in nats [B], of levels [B,C,H,W] and classes int64 [B] that are known to be valid."""
        return -self.log_prob(x, y).sum((1, 2, 3))

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Nats of each value given the class and all before it, [B,C,H,W]; arguments as of `forward`."""
        features = self.features(x, y)
        with torch.autocast(features.device.type, enabled=False):  # probabilities are float32, however it trains
            return self.likelihood.log_prob(features, x)

    @torch.no_grad()
    def nats(self, x: Tensor, y: Tensor | Sequence[int | str], flip_mixture: bool = False) -> Tensor:
        """Return -log p(x | y) in nats an image [B]; no gradients; to train, call the model itself.

        Raises UserError, a ValueError, where these are no images and classes of this model.

        Args:
            x: levels uint8 [B,C,H,W].
            y: the class of each, int64 [B], or a list of classes by name or number.
            flip_mixture: of the density that is half this one and half this one of the mirror image: 1 bit more at
                most, and less where what is seen may as well be mirrored.
        """
        x, y = self._checked(x, y)
        with eval_mode(self):
            nats = self(x, y)
            return even_mixture(nats, self(x.flip(-1), y)) if flip_mixture else nats

    @torch.no_grad()
    def bits_per_pixel(self, x: Tensor, y: Tensor | Sequence[int | str]) -> Tensor:
        """Return where the bits are spent: [B,H,W], whose sum is `nats` in bits. Arguments as of `nats`."""
        with eval_mode(self):
            return bits(-self.log_prob(*self._checked(x, y)).sum(1))

    def classify(self, x: Tensor, prior: Tensor | None = None, batch_size: int = 64) -> Tensor:
        """Return log p(y | x) by Bayes' rule: float64 [B,num_classes] on the CPU, of levels uint8 [B,C,H,W].

        Raises UserError where x are no images of this model, or where it knows no classes.

        Args:
            prior: p(y) [num_classes]; all classes alike where there is none.
            batch_size: images at a time.
        """
        self._require_images(x)
        if not self.conditional:
            raise UserError("this model knows no classes; train one with conditional=true")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be 1 or more")
        if prior is None:
            prior = torch.full((self.num_classes,), 1 / self.num_classes)
        if not isinstance(prior, Tensor) or prior.shape != (self.num_classes,) or not bool((prior >= 0).all()):
            raise UserError(f"prior: {_described(prior)}; give a torch.Tensor of shares, [{self.num_classes}]")
        return posterior(self.class_log_likelihoods(x, batch_size), prior)

    @torch.no_grad()
    def class_log_likelihoods(self, x: Tensor, batch_size: int) -> Tensor:
        """log p(x | y) in nats of images uint8 [N,C,H,W] given each of `classes`: [N,len(classes)], on the CPU."""
        rows = []
        with eval_mode(self):
            for batch in progress(x.split(batch_size), desc="classifying"):
                here = batch.to(self.device)
                given = [torch.full((len(here),), label, device=self.device) for label in self.classes]
                rows.append(torch.stack([-self(here, y) for y in given], dim=1).cpu())
        return torch.cat(rows)

    def check_sampler(self, sampler: dict[str, Any], group: str = "sampler") -> None:
        """Raise UserError, which names settings in their `group`, unless the model can be drawn from by this config."""
        _, settings = inspect_config(group, sampler, Tensor, ["request"])
        steering = {key: settings[key] for key in ("guidance_scale", "mix_with") if key in settings}
        refuse_steering(self, **steering, prefix=group and f"{group}.")

    def checkpoint_blocks(self) -> bool:
        """Compute each block twice from now on, to keep its input alone; returns whether the network has any."""
        return bool(checkpoint_blocks(self))

    def digest(self) -> str:
        """Return a SHA-256 of the weights and of what decides how they are used."""
        used = ("model", "likelihood", "image_shape", "levels", "conditional")
        weights = {name: value.cpu() for name, value in self.state_dict().items()}
        return digest(weights, json.dumps({key: self.settings[key] for key in used}, sort_keys=True))

    def draw(
        self,
        sampler: dict[str, Any],
        classes: Sequence[int] | None = None,
        threads: int = 1,
        group: str = "sampler",
        **own: Any,
    ) -> Tensor:
        """Return images of each class by the config of a sampler: uint8 [K,n,C,H,W]; `own`: as in `Request`.

        Steps are many and small: on several `threads`, all wait for each of them whenever another program runs. Errors
        name a setting in its `group`.
        """
        self.check_sampler(sampler, group)
        y = torch.tensor(self.classes if classes is None else list(classes), device=self.device)
        with on_threads(threads):
            return build(group, sampler, Tensor, request=Request(self, y, **own))

    def sample(
        self, n_per_class: int = 1, classes: Sequence[int | str] | None = None, seed: int = 0, **settings: object
    ) -> Tensor:
        """Return images of each class: uint8 [K,n_per_class,C,H,W].

        The same arguments give the same images, whatever else is asked for.

        Args:
            classes: by name or number; all where there are none.
            settings: of `pixelcnn_lit.samplers.draw.draw`, as `temperature` and `guidance_scale`.
        """
        numbers = None if classes is None else self.class_numbers(classes)
        return self.draw(_sampler(settings, n_per_class=n_per_class, seed=seed), numbers, group="")

    def complete(
        self,
        x: Tensor,
        known: Tensor,
        y: Tensor | Sequence[int | str],
        n: int = 1,
        seed: int = 0,
        **settings: object,
    ) -> Tensor:
        """Return images that keep the `known` pixels of x to the bit, the others drawn: uint8 [B,n,C,H,W].

        Args:
            x, y: as of `nats`. known: bool [H,W].
            settings: of `pixelcnn_lit.samplers.draw.draw`.
        """
        x, y = self._checked(x, y)
        if not len(x):
            raise UserError("x: no images; give some")
        if not isinstance(known, Tensor) or known.shape != x.shape[2:] or known.dtype != torch.bool:
            raise UserError(f"known: {_described(known)}; give a torch.Tensor, bool {list(x.shape[2:])}")
        sampler = _sampler(settings, n_per_class=n, seed=seed)
        return self.draw(sampler, y.tolist(), group="", image=x, known=known.to(self.device))

    def _checked(self, x: Tensor, y: Tensor | Sequence[int | str]) -> tuple[Tensor, Tensor]:
        """Return images and their classes on the model's device, which they are in its terms. Raises UserError."""
        self._require_images(x)
        if isinstance(y, list | tuple):
            y = torch.tensor(self.class_numbers(y, "y") if y else [], dtype=torch.int64)
        if not _holds_integers(y) or y.shape != x.shape[:1]:
            given = f"a list of {len(x)} names or numbers, or a torch.Tensor, int64 [{len(x)}]"
            raise UserError(f"y: {_described(y)}; give the class of each image: {given}")
        if len(y) and self.conditional:
            self._require_known(y.tolist(), y.tolist(), "y")
        return x.to(self.device), y.to(self.device)

    def _require_images(self, x: Tensor) -> None:
        if not _holds_integers(x) or tuple(x.shape[1:]) != self.image_shape:
            wanted = f"[B,{','.join(map(str, self.image_shape))}]"
            raise UserError(f"x: {_described(x)}; give a torch.Tensor of integers, {wanted}")
        if len(x) and (int(x.min()) < 0 or int(x.max()) >= self.levels):
            raise UserError(
                f"x: values {int(x.min())} to {int(x.max())}; this model is of levels 0 to {self.levels - 1}"
            )


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _holds_integers(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and not x.dtype.is_floating_point and x.dtype != torch.bool


def _described(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _sampler(settings: dict[str, Any], **own: int) -> dict[str, Any]:
    """Return the config of a sampler. Raises UserError where it is given a setting twice."""
    for key in settings.keys() & {"_target_", *own}:
        raise UserError(f"{key}: is set by another argument; leave it out")
    return {"_target_": SAMPLER, **own, **settings}


class DensityStepper:
    """The embedding and the network of a `Density` in steps: see `Stepper`."""

    def __init__(self, embed: Callable[[Tensor, At], Tensor], network: Stepper) -> None:
        self.embed = embed
        self.network = network
        self.skew = network.skew
        self.replayable = network.replayable

    def step(self, previous: Tensor, at: At) -> Tensor:
        return self.network.step(self.embed(previous, at), at)
