"""Weights from label counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arguments
from .targets import contents_may_be_checked


def pos_weight_from_counts(
    counts: Tensor, num_samples: int, *, max_weight: float | None = None
) -> Tensor:
    """Weights that let the positives of a label count as much as its negatives: (N - n) / n.

    To be given to a loss as ``pos_weight``. A label without positives (n = 0) has nothing to
    balance and gets 1.

    Args:
        counts: ``[C]``, in how many samples each label is positive.
        num_samples: number N of samples.
        max_weight: largest weight; None for no limit. Rare labels make gradients noisy without.

    Returns:
        The weights, ``[C]``, in torch's default dtype.

    Raises:
        TypeError: ``counts`` is not a tensor of numbers.
        ValueError: ``num_samples`` is negative, ``max_weight`` is not above 0, or a count lies
            outside [0, N] (where looking needs no synchronisation).

    >>> pos_weight_from_counts(torch.tensor([10, 50, 0, 1]), 100)
    tensor([ 9.,  1.,  1., 99.])
    >>> pos_weight_from_counts(torch.tensor([10, 50, 0, 1]), 100, max_weight=20)
    tensor([ 9.,  1.,  1., 20.])
    """
    n = _as_counts(counts)
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    if max_weight is not None and not 0 < max_weight < math.inf:
        raise ValueError(f"max_weight must be finite and above 0, got {max_weight}")
    if contents_may_be_checked(counts):
        wrong = ~((n >= 0) & (n <= num_samples))
        if bool(wrong.any()):
            raise ValueError(
                f"counts must lie in [0, num_samples = {num_samples}], got {n[wrong][0].item():g}"
            )
    weights = torch.where(n == 0, 1.0, (num_samples - n) / n)
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    return weights.to(torch.get_default_dtype())


def class_balanced_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """Weights by the effective number of samples of a label: (1 - beta) / (1 - beta^n).

    They are scaled to a mean of 1 over the labels with samples, so that they sum to C, as in the
    paper. A label without samples (n = 0) has no effective number and gets 1, the mean. To be given
    to a loss as ``weight`` (the paper's use: positives and negatives of a label alike) or as
    ``pos_weight``.

    Source: Cui, Jia, Lin, Song and Belongie, "Class-Balanced Loss Based on Effective Number of
    Samples", CVPR 2019, arXiv:1901.05555.

    Args:
        counts: ``[C]``, in how many samples each label is positive.
        beta: in [0, 1): 0 gives 1 for all labels, and the closer it is to 1, the closer weights are
            to 1 / n. The paper has 0.9 to 0.9999.

    Returns:
        The weights, ``[C]``, in torch's default dtype.

    Raises:
        TypeError: ``counts`` is not a tensor of numbers, or ``beta`` no number.
        ValueError: ``beta`` lies outside [0, 1), or a count is negative or not finite (where
            looking needs no synchronisation).

    >>> class_balanced_weights(torch.tensor([1, 10, 1000, 0]), beta=0.9)
    tensor([2.3932, 0.3674, 0.2393, 1.0000])
    """
    n = _as_counts(counts)
    if arguments.number_between(beta, "beta", 0.0, 1.0) == 1:
        raise ValueError(f"beta must be below 1, got {beta}")
    _check_counts(counts, n)
    # 1 - beta^n without the digits that are lost where beta^n is close to 1.
    effective = -torch.expm1(n * math.log(beta)) if beta > 0 else torch.ones_like(n)
    return _with_mean_one((1 - beta) / effective, n)


def inverse_frequency_weights(counts: Tensor, *, power: float = 1.0) -> Tensor:
    """Weights by a power of the inverse frequency of a label: n^-power.

    They are scaled as :func:`class_balanced_weights`: to a mean of 1 over the labels with samples,
    and a label without samples gets 1.

    Source: power 1 is the usual heuristic; 1/2, the square root, that of Mahajan et al., "Exploring
    the Limits of Weakly Supervised Pretraining", ECCV 2018, arXiv:1805.00932, for hashtags.

    Args:
        counts: ``[C]``, in how many samples each label is positive.
        power: in [0, 1]; 0 gives 1 for all labels.

    Returns:
        The weights, ``[C]``, in torch's default dtype.

    Raises:
        TypeError: ``counts`` is not a tensor of numbers, or ``power`` no number.
        ValueError: ``power`` lies outside [0, 1], or a count is negative or not finite (where
            looking needs no synchronisation).

    >>> inverse_frequency_weights(torch.tensor([1, 4, 16, 0]), power=0.5)
    tensor([1.7143, 0.8571, 0.4286, 1.0000])
    """
    n = _as_counts(counts)
    arguments.number_between(power, "power", 0.0, 1.0)
    _check_counts(counts, n)
    return _with_mean_one(n**-power, n)


def inverse_propensity(counts: Tensor, num_samples: int, A: float = 0.55, B: float = 1.5) -> Tensor:
    """How much a correct label is worth in PSP@k: more, the rarer it is.

    1 + C (n + B)^-A with C = (ln N - 1) (B + 1)^A, from Jain, Prabhu and Varma, "Extreme
    multi-label loss functions", KDD 2016, equation 2.

    Args:
        counts: [num_labels], how many training rows have each label.
        num_samples: number N of training rows, at least 3 (below, C is negative).
        A: constant of the data set; 0.55 serves all but Wikipedia (0.5) and Amazon (0.6).
        B: constant of the data set; 1.5 serves all but Wikipedia (0.4) and Amazon (2.6).

    Returns:
        [num_labels], float64.

    >>> inverse_propensity(torch.tensor([0, 1, 100]), num_samples=1000)
    tensor([8.8242, 6.9078, 1.7704], dtype=torch.float64)
    """
    if num_samples < 3:
        raise ValueError(f"num_samples must be at least 3, got {num_samples}")
    # Tensor arithmetic throughout: math.log and torch.log may differ in the last bit.
    n = counts.to(torch.float64)
    c = (torch.log(n.new_tensor(float(num_samples))) - 1) * (B + 1) ** A
    return 1 + c * (n + B) ** -A


def _as_counts(counts: Tensor) -> Tensor:
    if not isinstance(counts, Tensor) or counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must be a tensor of numbers, got {type(counts).__name__}")
    return counts.to(torch.float64)


def _check_counts(counts: Tensor, n: Tensor) -> None:
    if contents_may_be_checked(counts):
        wrong = ~((n >= 0) & (n < math.inf))
        if bool(wrong.any()):
            raise ValueError(f"counts must be finite and not negative, got {n[wrong][0].item():g}")


def _with_mean_one(weights: Tensor, n: Tensor) -> Tensor:
    """Scale weights to a mean of 1 over n > 0; the others are 1."""
    mean = torch.where(n > 0, weights, 0.0).sum() / (n > 0).sum()
    return torch.where(n > 0, weights / mean, 1.0).to(torch.get_default_dtype())
