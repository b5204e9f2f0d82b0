"""Row-wise losses from the sums of rows that come in parts.

A row's sums A, S, B, T are those of ``reference.row_sums``: e^A S over its positives, e^B T over
its negatives. There are N of them, not N times C: all of this is in fp64 and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def combined(parts: Tensor) -> Tensor:
    """Add up the sums of parts ``[parts, N, 4]`` in their order: ``[N, 4]``, fp64."""
    largest, sums = parts.double().unflatten(2, (2, 2)).unbind(dim=3)  # [parts, N, 2] each
    # An empty sum says nothing of the largest; an infinite one is so whatever it is.
    shift = torch.where(sums == 0, -math.inf, largest).amax(dim=0)
    shift = torch.where(shift.isinf(), 0.0, shift)
    scaled = torch.where((sums == 0) | sums.isinf(), sums, sums * (largest - shift).exp())
    return torch.stack([shift, scaled.sum(dim=0)], dim=2).flatten(1)


class FinishedRows(NamedTuple):
    """What a loss is, and what its gradients need.

    Attributes:
        losses: ``[N]``, fp64.
        statistics: ``[N, 4]``, fp64, those of ``reference.zlpr_gradient_over``.
        threshold_slopes: derivatives of the losses by their thresholds, ``[N]``, fp64; None where
            there are none.
    """

    losses: Tensor
    statistics: Tensor
    threshold_slopes: Tensor | None = None


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
        losses.append(_softplus(distance))
        # Relative to the larger of e^own and e^largest.
        shift = torch.where(total == 0, own, torch.maximum(largest, own))
        others = torch.where(total == 0, 0.0, total * (largest - shift).exp())
        statistics += [shift, 1 / ((own - shift).exp() + others)]
        slopes.append(torch.sigmoid(-distance))
    return FinishedRows(
        losses[0] + losses[1], torch.stack(statistics, dim=1), slopes[1] - slopes[0]
    )


def multilabel_ranking_loss(sums: Tensor) -> FinishedRows:
    """Finish the ranking loss: L = softplus(log(e^A S) + log(e^B T)), 0 where a side is empty.

    Args:
        sums: ``[N, 4]``, fp64.
    """
    a, positives, b, negatives = sums.unbind(dim=1)
    empty = (positives == 0) | (negatives == 0)
    # NaN on one side counts although the other is empty.
    nothing = torch.where(positives.isnan() | negatives.isnan(), math.nan, 0.0).to(sums.dtype)
    exponent = (a + b) + (positives.log() + negatives.log())
    slope = torch.sigmoid(exponent)
    factors = [torch.where(empty, nothing, slope / total) for total in (positives, negatives)]
    statistics = torch.stack([a, factors[0], b, factors[1]], dim=1)
    return FinishedRows(torch.where(empty, nothing, _softplus(exponent)), statistics)


def _softplus(x: Tensor) -> Tensor:
    """Exact in both tails; softplus of torch gives up the lower one at -37."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


# Of each loss: what makes losses from the sums of rows and, if it has one, the threshold.
FINISH: dict[str, Callable[..., FinishedRows]] = {
    "multilabel_categorical_crossentropy": multilabel_categorical_crossentropy,
    "multilabel_ranking_loss": multilabel_ranking_loss,
}
