"""Classifiers: small networks that read an image's class, to judge samples by.

Each is a `Classifier` (protocols.py) for images of any size that leaves something to look at.
"""

from http.client import HTTPException
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as images

from pixelcnn_lit.config.errors import UserError, first_line

Shape = tuple[int, int, int]
Positive = Annotated[float, Ge(1e-6)]


class CNN(nn.Module):
    """Two 5×5 convolutions with max-pooling, and three linear layers: the network of PyTorch's own tutorial."""

    mean, std = (0.5,), (0.5,)  # as the tutorial scales images, not by their own

    def __init__(self, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, *sides = image_shape
        height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
        if min(height, width) < 1:
            raise ValueError("wants images of 16×16 and more; type classifier=resnet")
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(84, num_classes)


class ConvBN(nn.Module):
    """Four stages of convolution, ReLU and BatchNorm, pooled between; a convolution over what is left, 4×4 of 32×32."""

    def __init__(self, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, pixels = image_shape[0], _left_of(image_shape)
        layers: list[nn.Module] = []
        for n, (a, b) in enumerate(((channels, 32), (32, 64), (64, 128), (128, 256))):
            layers += [nn.MaxPool2d(2)] if n else []
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(b)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(256 * pixels, num_classes)  # a convolution over all that is left, written as a product


def _left_of(image_shape: Shape) -> int:
    """The number of pixels after three 2×2 poolings."""
    height, width = (side // 8 for side in image_shape[1:])
    if min(height, width) < 1:
        raise ValueError("wants images of 8×8 and more")
    return height * width


class VGG(nn.Module):
    """Three blocks of two 3×3 convolutions and a 2×2 pooling, and three linear layers: 4096-2048-256-classes of 32×32.

    In the style of Simonyan, Zisserman 2015, Very Deep Convolutional Networks (arXiv 1409.1556), and much smaller.
    """

    def __init__(self, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, pixels = image_shape[0], _left_of(image_shape)
        layers: list[nn.Module] = []
        for a, b, c in ((channels, 16, 32), (32, 64, 128), (128, 128, 256)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, c, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(256 * pixels, 2048), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(256, num_classes)


class ResNet(nn.Module):
    """A ResNet of 6 n_residual + 2 layers for small images.

    He et al. 2016, Deep Residual Learning (arXiv 1512.03385), section 4.2, with 1×1 convolutions where the width
    changes (its option B). Their ResNet-20 is width=16 n_residual=3 with shortcuts that are padded with zeros (option
    A); by default this one is twice as wide, and 14 layers deep.

    Args:
        width: channels of the first of three stages, each twice as wide as the one before.
        n_residual: blocks a stage.
    """

    def __init__(
        self,
        image_shape: Shape,
        num_classes: int,
        width: Annotated[int, Ge(1)] = 32,
        n_residual: Annotated[int, Interval(ge=1, le=200)] = 2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        before = width
        for stage in range(3):
            for block in range(n_residual):
                layers.append(ResidualBlock(before, width << stage, stride=2 if stage and not block else 1))
                before = width << stage
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(before, num_classes)


class ResidualBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        changes, self.stride = before != after or stride > 1, stride
        self.shortcut = nn.Conv2d(before, after, 1, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # Not a stride of the 1×1 convolution: oneDNN on AVX2 gets its gradient wrong where x has fewer than 8 channels
        # (torch 2.15; tests/test_classifiers.py compares it with float64).
        return F.relu(self.shortcut(x[..., :: self.stride, :: self.stride]) + h)


class VGG16Transfer(nn.Module):
    """VGG-16 with the convolutions that were trained on ImageNet, and a new head: 4096-4096-classes, with dropout.

    Args:
        weights: of torchvision, which downloads them where a run starts; null starts from nothing.
        train_convolutions: false trains the head alone.
        mean, std: what images are scaled by, of each channel; by default what these weights were trained with.
        shift: in training, each image moves by up to so many pixels of 224 each way; black comes in at the edges.
    """

    SIDE = 224

    def __init__(
        self,
        image_shape: Shape,
        num_classes: int,
        weights: str | None = "IMAGENET1K_V1",
        train_convolutions: bool = False,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225),
        shift: Annotated[int, Interval(ge=0, le=SIDE)] = 0,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.shift = shift
        black = [-m / s for m, s in zip(mean, std, strict=True)]
        self.crop = v2.RandomCrop(self.SIDE, padding=shift, fill=black)
        self.weights = weights
        self.convolutions = models.vgg16().features.requires_grad_(train_convolutions)
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        )  # fmt: skip
        self.head = nn.Linear(4096, num_classes)

    def load_pretrained(self) -> None:
        """Raises UserError where the weights cannot be had."""
        if self.weights is None:
            return
        try:
            published = models.VGG16_Weights[self.weights].get_state_dict(progress=True, check_hash=True)
        except KeyError:
            known = ", ".join(models.VGG16_Weights.__members__)
            raise UserError(
                f"classifier.weights={self.weights}: torchvision has no such; type one of {known}"
            ) from None
        except (OSError, RuntimeError, HTTPException) as error:  # no network, a damaged file, a connection that broke
            raise UserError(
                f"classifier.weights={self.weights}: cannot be downloaded ({first_line(error)}); "
                "classifier.weights=null starts without"
            ) from error
        convolutions = {name: value for name, value in published.items() if name.startswith("features.")}
        self.convolutions.load_state_dict({name.removeprefix("features."): v for name, v in convolutions.items()})

    def body(self, x: Tensor) -> Tensor:
        """[B,1 or 3,H,W] -> [B,4096]."""
        rgb = x.expand(-1, 3, -1, -1)
        enlarged = images.resize(rgb, [self.SIDE, self.SIDE], antialias=True)
        if self.training and self.shift:
            enlarged = torch.stack([self.crop(image) for image in enlarged])  # each on its own
        return self.hidden(self.convolutions(enlarged))
