"""Scores of what a model says of the classes of images."""

from typing import NamedTuple

from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error


class Scores(NamedTuple):
    """Scores of p(y | x) on labelled images.

    accuracy: share of them whose class is the likeliest. nll: mean -log p of the class, in nats. calibration_error: how
    far confidence is from accuracy (Guo et al. 2017, arXiv 1706.04599, equation 3, in 15 bins).
    """

    accuracy: float
    nll: float
    calibration_error: float


def score(log_posterior: Tensor, y: Tensor) -> Scores:
    """Score log p(y | x) [N,num_classes] and the classes y [N]."""
    num_classes = log_posterior.shape[1]
    right = (log_posterior.argmax(1) == y).double().mean()
    nll = -log_posterior.gather(1, y[:, None]).mean()
    error = multiclass_calibration_error(log_posterior.exp(), y, num_classes, n_bins=15)
    return Scores(float(right), float(nll), float(error))
