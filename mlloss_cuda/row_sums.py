"""Row-wise losses from the sums of rows that come in parts.

A row's sums A, S, B, T are those of ``reference.row_sums``: e^A S over its positives, e^B T over
its negatives. There are N of them, not N times C: all of this is in fp64 and costs nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def combined(parts: Tensor) -> Tensor:
    """Add up the sums of parts ``[parts, N, 4]`` in their order: ``[N, 4]``, fp64."""
    largest, sums = parts.double().unflatten(2, (2, 2)).unbind(dim=3)  # [parts, N, 2] each
    # An empty sum says nothing of the largest; an infinite one is so whatever it is.
    shift = torch.where(sums == 0, -math.inf, largest).amax(dim=0)
    shift = torch.where(shift.isinf(), 0.0, shift)
    scaled = torch.where(sums == 0, 0.0, sums * (largest - shift).exp())
    return torch.stack([shift, scaled.sum(dim=0)], dim=2).flatten(1)


class FinishedRows(NamedTuple):
    """What a loss is, and what its gradients need.

    Attributes:
        losses: ``[N]``, fp64.
        statistics: ``[N, 4]``, fp64, those of ``reference.zlpr_gradient_over``.
        threshold_slopes: derivatives of the losses by their thresholds, ``[N]``, fp64.
    """

    losses: Tensor
    statistics: Tensor
    threshold_slopes: Tensor


def multilabel_categorical_crossentropy(sums: Tensor, threshold: Tensor) -> FinishedRows:
    """Finish ZLPR: L = softplus(log(e^A S) + s0) + softplus(log(e^B T) - s0).

    Args:
        sums: ``[N, 4]``, fp64.
        threshold: s0, ``[N]``.
    """
    losses, statistics, slopes = [], [], []
    for side, own in ((sums[:, :2], -threshold.double()), (sums[:, 2:], threshold.double())):
        largest, total = side.unbind(dim=1)
        distance = largest + total.log() - own
        # Exact in both tails; softplus of torch gives up the lower one at -37.
        losses.append(distance.clamp(min=0) + (-distance.abs()).exp().log1p())
        # Relative to the larger of e^own and e^largest.
        shift = torch.where(total == 0, own, torch.maximum(largest, own))
        others = torch.where(total == 0, 0.0, total * (largest - shift).exp())
        statistics += [shift, 1 / ((own - shift).exp() + others)]
        slopes.append(torch.sigmoid(-distance))
    return FinishedRows(
        losses[0] + losses[1], torch.stack(statistics, dim=1), slopes[1] - slopes[0]
    )
