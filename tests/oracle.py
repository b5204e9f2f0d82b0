"""The losses written down once more, in NumPy and fp64, straight from their definitions.

Nothing here comes from the package: dense arrays, one formula per line, no attention to speed.
Gradients come with the magnitude that rounding errors are to be judged by: where a gradient is the
difference of two terms, the sum of their magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Expected(NamedTuple):
    loss: Array
    gradient: Array  # [N, C]
    gradient_magnitude: Array  # [N, C]
    threshold_gradient: Array  # [N], row losses
    threshold_magnitude: Array  # [N]


def softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))


def shares(factors: Array, z: Array) -> Array:
    """Each term's part of the sum of factor * e^z."""
    parts = factors * np.exp(z - z.max())
    return parts / parts.sum()


def _reduce(
    terms: Array,
    observed: NDArray[np.bool_],
    factor: Array,
    reduction: str,
    normalizer: float | None,
) -> tuple[Array, float]:
    """Reduce m w L; return the loss and what the gradient of the sum is multiplied by."""
    if reduction == "none":
        return terms, 1.0
    denominator = {
        "sum": 1.0,
        "mean": float(observed.sum()),
        "mean_nonzero": float((factor != 0).sum()),
        "weighted_mean": float(factor.sum()),
        "batchmean": float(len(terms)),
    }[reduction]
    if normalizer is not None:
        denominator = normalizer
    if denominator == 0:
        return np.zeros(()), 0.0
    return terms.sum() / denominator, 1.0 / denominator


def sigmoid_cross_entropy(
    x: Array,
    y: Array,
    observed: NDArray[np.bool_],
    *,
    weight: Array | float = 1.0,
    pos_weight: Array | float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Array | float = 1.0,
) -> Expected:
    """All arrays [N, C] or broadcast to it; `upstream` is what arrives from above in backward."""
    factor = np.where(observed, np.broadcast_to(weight, x.shape), 0.0)
    x = np.where(factor != 0, x, 0.0)
    y = np.where(factor != 0, y, 0.0) * (1 - label_smoothing) + label_smoothing / 2
    with np.errstate(invalid="ignore"):
        positive = np.where(y > 0, pos_weight * y * softplus(-x), 0.0)
        negative = np.where(y < 1, (1 - y) * softplus(x), 0.0)
    terms = np.where(factor != 0, factor * (positive + negative), 0.0)
    loss, scale = _reduce(terms, observed, factor, reduction, normalizer)
    rising, falling = (1 - y) * sigmoid(x), pos_weight * y * sigmoid(-x)
    outer = factor * scale * upstream
    none = np.zeros(len(x))
    return Expected(
        loss, outer * (rising - falling), np.abs(outer) * (rising + falling), none, none
    )


def multilabel_categorical_crossentropy(
    x: Array,
    y: Array,
    observed: NDArray[np.bool_],
    *,
    threshold: Array | float = 0.0,
    weight: Array | float = 1.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Array | float = 1.0,
) -> Expected:
    """`threshold`, `weight` and `upstream` are [N] or broadcast to it."""
    rows = len(x)
    s0 = np.broadcast_to(threshold, rows)
    factor = np.broadcast_to(np.asarray(weight, np.float64), rows)
    terms = np.zeros(rows)
    gradient, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    threshold_gradient, threshold_magnitude = np.zeros(rows), np.zeros(rows)
    for row in range(rows):
        if factor[row] == 0:
            continue
        positives = observed[row] & (y[row] > 0)
        negatives = observed[row] & (y[row] < 1)
        y_positive, x_positive = y[row][positives], -x[row][positives]
        y_negative, x_negative = 1 - y[row][negatives], x[row][negatives]
        # LA + s0 and LB - s0: neither is smaller than 0, so their sum loses no digits.
        terms[row] = factor[row] * (
            softplus(np.logaddexp.reduce(np.log(y_positive) + x_positive) + s0[row])
            + softplus(np.logaddexp.reduce(np.log(y_negative) + x_negative) - s0[row])
        )
        falling = factor[row] * shares(np.append(y_positive, 1), np.append(x_positive, -s0[row]))
        rising = factor[row] * shares(np.append(y_negative, 1), np.append(x_negative, s0[row]))
        gradient[row][positives] -= falling[:-1]
        gradient[row][negatives] += rising[:-1]
        magnitude[row][positives] += falling[:-1]
        magnitude[row][negatives] += rising[:-1]
        threshold_gradient[row] = rising[-1] - falling[-1]
        threshold_magnitude[row] = rising[-1] + falling[-1]
    loss, scale = _reduce(terms, np.ones(rows, bool), factor, reduction, normalizer)
    outer = np.broadcast_to(scale * np.asarray(upstream), rows)
    return Expected(
        loss,
        gradient * outer[:, None],
        magnitude * np.abs(outer)[:, None],
        threshold_gradient * outer,
        threshold_magnitude * np.abs(outer),
    )
