"""Exact likelihoods put together: Bayes' rule, p(y | x) ∝ p(x | y) p(y), with p(x), the sum; and an even mixture."""

import math

import torch
from torch import Tensor


def class_prior(y: Tensor, num_classes: int) -> Tensor:
    """Return how often each class is among y [N]: float64 [num_classes]."""
    return torch.bincount(y, minlength=num_classes).double() / len(y)


def marginal(log_likelihoods: Tensor, prior: Tensor) -> Tensor:
    """log p(x) [N] from log p(x | y) [N,num_classes] and p(y) [num_classes]."""
    return (log_likelihoods.double() + prior.log()).logsumexp(1)


def posterior(log_likelihoods: Tensor, prior: Tensor) -> Tensor:
    """log p(y | x) [N,num_classes] from log p(x | y) [N,num_classes] and p(y) [num_classes]."""
    return (log_likelihoods.double() + prior.log()).log_softmax(1)


def even_mixture(nats: Tensor, others: Tensor) -> Tensor:
    """-log(p / 2 + q / 2) of nats -log p and -log q: at most log 2 more than the smaller of them."""
    return math.log(2) - torch.logaddexp(-nats, -others)
