"""Bayes' rule on exact likelihoods: a density model as a classifier, p(y | x) ∝ p(x | y) p(y), and p(x), the sum."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from pixelcnn_lit.density.density import Density
from pixelcnn_lit.runs.terminal import progress


class Scores(NamedTuple):
    """Scores of p(y | x) on labelled images.

    accuracy: share of them whose class is the likeliest. nll: mean -log p of the class, in nats. calibration_error: how
    far confidence is from accuracy (Guo et al. 2017, arXiv 1706.04599, equation 3, in 15 bins).
    """

    accuracy: float
    nll: float
    calibration_error: float


@torch.no_grad()
def class_log_likelihoods(model: Density, x: Tensor, batch_size: int) -> Tensor:
    """log p(x | y) in nats of images uint8 [N,C,H,W] given each class: [N,num_classes], on the CPU."""
    rows = []
    for batch in progress(x.split(batch_size), desc="classifying"):
        here = batch.to(model.device)
        given = [torch.full((len(here),), label, device=model.device) for label in model.classes]
        rows.append(torch.stack([-model(here, y) for y in given], dim=1).cpu())
    return torch.cat(rows)


def class_prior(y: Tensor, num_classes: int) -> Tensor:
    """Return how often each class is among y [N]: float64 [num_classes]."""
    return torch.bincount(y, minlength=num_classes).double() / len(y)


def marginal(log_likelihoods: Tensor, prior: Tensor) -> Tensor:
    """log p(x) [N] from log p(x | y) [N,num_classes] and p(y) [num_classes]."""
    return (log_likelihoods.double() + prior.log()).logsumexp(1)


def posterior(log_likelihoods: Tensor, prior: Tensor) -> Tensor:
    """log p(y | x) [N,num_classes] from log p(x | y) [N,num_classes] and p(y) [num_classes]."""
    return (log_likelihoods.double() + prior.log()).log_softmax(1)


def score(log_posterior: Tensor, y: Tensor) -> Scores:
    """Score log p(y | x) [N,num_classes] and the classes y [N]."""
    num_classes = log_posterior.shape[1]
    right = (log_posterior.argmax(1) == y).double().mean()
    nll = -log_posterior.gather(1, y[:, None]).mean()
    error = multiclass_calibration_error(log_posterior.exp(), y, num_classes, n_bins=15)
    return Scores(float(right), float(nll), float(error))
