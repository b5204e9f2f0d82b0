"""Weights from label counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    if not isinstance(counts, Tensor) or counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must be a tensor of numbers, got {type(counts).__name__}")
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    if max_weight is not None and not 0 < max_weight < math.inf:
        raise ValueError(f"max_weight must be finite and above 0, got {max_weight}")
    n = counts.to(torch.float64)
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
