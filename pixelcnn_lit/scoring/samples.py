"""Samples judged by a classifier: see `SampleScores`.

Distances are between features, which the classifier's head reads, of the images and of the training set:

Fréchet distance: Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (arXiv 1706.08500), equation 6.
Kernel distance: Bińkowski et al. 2018, Demystifying MMD GANs (arXiv 1801.01401), section 4.
Both are published for an Inception network on ImageNet; read by another judge, they compare with each other alone.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pixelcnn_lit.data.images import Split
from pixelcnn_lit.lit.classifier_module import ClassifierModule
from pixelcnn_lit.lit.metrics import accuracy, per_class
from pixelcnn_lit.runs.terminal import progress

warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")  # which are few


class Features(NamedTuple):
    """Images as a judge reads them: features [N,F], and the class it takes each for, int64 [N]. On the CPU."""

    features: Tensor
    guesses: Tensor


class SampleScores(NamedTuple):
    """Scores of images that were drawn for a class.

    consistency: share of them that the judge takes for that class; consistency_per_class. confusion
    [num_classes,num_classes]: how many of a class (row) it takes for which (column). frechet, kernel: distances from
    the training images. diversity: mean distance of two images of one class.
    """

    consistency: float
    consistency_per_class: list[float | None]
    confusion: Tensor
    frechet: float
    kernel: float
    diversity: float


@torch.no_grad()
def read(judge: ClassifierModule, images: Split, batch_size: int) -> Features:
    """Images, read in batches on the judge's device."""
    batches = progress(images.parts(batch_size), desc="reading")
    features = torch.cat([judge.features(batch.x.to(judge.device)).cpu() for batch in batches])
    heads = [judge.net.head(batch.to(judge.device)).cpu() for batch in features.split(batch_size)]
    return Features(features, torch.cat(heads).argmax(1))


def verdict(drawn: Features, y: Tensor, training: Features, num_classes: int, n_compared: int) -> SampleScores:
    """Score images drawn for the classes y [N], beside the training images.

    Distances are of the first `n_compared` images of each class, since they depend on the number of images.
    """
    confusion = multiclass_confusion_matrix(drawn.guesses, y, num_classes)
    some = torch.cat([(y == label).nonzero()[:n_compared, 0] for label in y.unique()])
    return SampleScores(
        accuracy(confusion),
        per_class(confusion),
        confusion,
        frechet_distance(training.features, drawn.features[some]),
        kernel_distance(training.features, drawn.features[some]),
        diversity(drawn.features[some], y[some]),
    )


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Between normal distributions of the moments of two sets of features [N,F] and [M,F]."""
    metric = FrechetInceptionDistance(_as_they_are(real))
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, drawn: Tensor) -> float:
    """The mean squared maximum mean discrepancy of a cubic kernel, over 100 random subsets of two sets of features."""
    metric = KernelInceptionDistance(_as_they_are(real), subset_size=min(1000, len(real), len(drawn)))
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


def _as_they_are(features: Tensor) -> nn.Module:
    extractor = nn.Identity()
    extractor.num_features = features.shape[1]  # pyright: ignore[reportArgumentType]
    return extractor


def diversity(features: Tensor, y: Tensor) -> float:
    """Mean Euclidean distance of two different images of one class, from features [N,F] of the classes y [N]."""
    means = [torch.nn.functional.pdist(features[y == label]).mean() for label in y.unique()]
    return float(torch.stack(means).nanmean())


def nearest(drawn: Tensor, training: Tensor) -> Tensor:
    """For each of the features [N,F], the position of the closest of [M,F]: int64 [N]."""
    return torch.cdist(drawn, training).argmin(1)
