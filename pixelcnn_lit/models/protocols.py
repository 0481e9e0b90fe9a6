"""The contracts between the parts of a density model.

Letters: B batch, C channels of the image, H W its size, V levels of a value, E channels of the embedded image,
D features per pixel; n pixels of a wavefront.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pixelcnn_lit.nn.wavefronts import At


class Embedding(Protocol):
    """A module that reads levels, made of `channels`, `levels` and its own settings, `model.embedding`.

    What it makes of a pixel may depend on that pixel and on earlier ones.
    """

    out_channels: int  # E

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels [B,C,H,W] -> [B,E,H,W] in `dtype`."""
        ...

    def stepper(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, At], Tensor]:
        """Return a function of the levels of the wavefront before `at`, [nB,C], to what they are read as, [nB,E]."""
        ...


class Stepper(Protocol):
    """A network, or a whole model, that goes through images step by step, in eval mode.

    Args:
        skew: of its wavefronts: see `pixelcnn_lit.nn.wavefronts`; the width of images where it goes pixel by pixel.
        replayable: whether a CUDA graph may replay its steps within a row: all that depends on the column is computed
            from `at.column_on_device`.
    """

    skew: int
    replayable: bool

    def step(self, previous: Tensor, at: At) -> Tensor:
        """Return the features [nB,D] at a wavefront, equal to `forward` there; asked for in the order of `steps`.

        `previous` is the wavefront before: of a network embedded, [nB,E], of a model as levels, [nB,C]. At position 0
        there is none, it is ignored, and all that was kept of other images is forgotten.
        """
        ...


@runtime_checkable
class Network(Protocol):
    """A causal map: features at a pixel are a function of the class and of strictly earlier pixels in raster order.

    Made as `Net(image_size, in_channels, num_classes, out_channels, hidden_channels, n_residual, **own)`, where
    `image_size` is (H, W), any of at least 1, `in_channels` E and `out_channels` D. One that sees every earlier pixel,
    where it is deep enough, may say `no_blind_spot = True`; the laws then hold it to that.
    """

    train_is_likelihood: bool  # whether its loss in training mode is a likelihood: batch statistics make it none

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, h: Tensor, y: Tensor) -> Tensor:
        """Embedded image [B,E,H,W] and class int64 [B], `num_classes` for "no class" -> features [B,D,H,W]."""
        ...

    def receptive_field(self, i: int, j: int) -> Tensor:
        """Return the pixels, bool [H,W], that the features at row i, column j depend on."""
        ...


@runtime_checkable
class SteppableNetwork(Network, Protocol):
    """A network that can compute one pixel, or one wavefront, without the whole image."""

    def stepper(self, y: Tensor) -> Stepper:
        """Return what steps through images of the classes y [B]."""
        ...


class Likelihood(Protocol):
    """The distribution inside one pixel, channel by channel.

    Made of `image_shape`, `levels` and its own settings before the network, which it tells its width. It is called
    without autocast, and given features in any floating type.
    """

    out_channels: int  # D: the features that it asks for

    def log_prob(self, features: Tensor, x: Tensor) -> Tensor:
        """Features [B,D,H,W] and levels [B,C,H,W] -> nats of each value [B,C,H,W]."""
        ...

    def channel_logits(self, features: Tensor, x: Tensor, c: int) -> Tensor:
        """log p(x_c | x_<c, earlier pixels), normalised: [B,D,...] and [B,C,...] -> [B,V,...], at least float32."""
        ...


class ImageDensity(Protocol):
    """The part of a model that a sampler sees: `pixelcnn_lit.density.density.Density`."""

    embedding: Embedding
    network: Network
    likelihood: Likelihood
    image_shape: tuple[int, int, int]
    no_class: int

    @property
    def level_dtype(self) -> torch.dtype:
        """In which its images are."""
        ...

    @property
    def can_step(self) -> bool:
        """Whether there is a `stepper`."""
        ...

    @property
    def known_classes(self) -> list[int]: ...

    def digest(self) -> str:
        """Of the weights and of what decides how they are used."""
        ...

    def features(self, x: Tensor, y: Tensor) -> Tensor:
        """Levels [B,C,H,W] and classes int64 [B] -> [B,D,H,W]."""
        ...

    def stepper(self, y: Tensor) -> Stepper:
        """Return what steps through images of the classes y [B]."""
        ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...
