"""The losses written down once more, in NumPy and fp64, straight from their definitions.

Nothing here comes from the package: dense arrays, one formula per line, no attention to speed.
Values and gradients come with the magnitude that rounding errors are to be judged by: where a
number is the difference of two terms, the sum of their magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Expected(NamedTuple):
    loss: Array
    loss_magnitude: Array
    gradient: Array  # [N, C]
    gradient_magnitude: Array  # [N, C]
    threshold_gradient: Array | None = None  # [N]
    threshold_magnitude: Array | None = None  # [N]


class Terms(NamedTuple):
    """Unweighted losses, and their derivatives by the input."""

    loss: Array
    loss_magnitude: Array
    gradient: Array
    gradient_magnitude: Array


def softplus(z: Array) -> Array:
    return np.logaddexp(0.0, z)


def sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))


def vanishing_product(factor: Array, other: Array) -> Array:
    """factor * other, where `factor` falls to 0 faster than `other` rises to infinity."""
    return factor * np.where(factor == 0, 0.0, other)


def shares(factors: Array, z: Array) -> Array:
    """Each term's part of the sum of factor * e^z; 0 of a sum that is 0."""
    largest = z.max(initial=-np.inf)
    if largest == -np.inf:
        return np.zeros(len(z))
    parts = factors * np.exp(z - largest)
    return parts / parts.sum()


class Reduced(NamedTuple):
    loss: Array
    loss_magnitude: Array
    scale: float  # what the gradient of the sum is multiplied by


def reduce(
    terms: Array,
    magnitudes: Array,
    observed: Mask,
    factor: Array,
    reduction: str,
    normalizer: float | None,
) -> Reduced:
    """Reduce m w L, which `terms` already is; `factor` is m w."""
    if reduction == "none":
        return Reduced(terms, magnitudes, 1.0)
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
        return Reduced(np.zeros(()), np.zeros(()), 0.0)
    return Reduced(terms.sum() / denominator, magnitudes.sum() / denominator, 1.0 / denominator)


# ---- Pointwise losses ----------------------------------------------------------------------------

PLACEHOLDER = 0.5  # for what is masked: a logit and a probability


def _pointwise(
    formula: Callable[[Array, Array], Terms],
    x: Array,
    y: Array,
    observed: Mask,
    *,
    weight: Array | float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Array | float = 1.0,
) -> Expected:
    """All arrays [N, C] or broadcast to it; `upstream` is what arrives from above in backward."""
    factor = np.where(observed, np.broadcast_to(weight, x.shape), 0.0)
    used = factor != 0
    y = np.where(used, y, 0.0) * (1 - label_smoothing) + label_smoothing / 2
    terms = formula(np.where(used, x, PLACEHOLDER), y)
    with np.errstate(invalid="ignore"):
        values = np.where(used, factor * terms.loss, 0.0)
        magnitudes = np.where(used, factor * terms.loss_magnitude, 0.0)
    reduced = reduce(values, magnitudes, observed, factor, reduction, normalizer)
    outer = factor * reduced.scale * upstream
    return Expected(
        reduced.loss,
        reduced.loss_magnitude,
        outer * terms.gradient,
        np.abs(outer) * terms.gradient_magnitude,
    )


def _positive_and_negative(y: Array, positive: Array, negative: Array) -> Array:
    """y positive + (1 - y) negative, where either may be infinite and count for nothing."""
    return np.where(y > 0, y * np.where(y > 0, positive, 0.0), 0.0) + np.where(
        y < 1, (1 - y) * np.where(y < 1, negative, 0.0), 0.0
    )


def sigmoid_cross_entropy(
    x: Array, y: Array, observed: Mask, *, pos_weight: Array | float = 1.0, **common: Any
) -> Expected:
    """L = pos_weight y sp(-x) + (1 - y) sp(x)."""

    def formula(x: Array, y: Array) -> Terms:
        loss = _positive_and_negative(y, pos_weight * softplus(-x), softplus(x))
        rising, falling = (1 - y) * sigmoid(x), pos_weight * y * sigmoid(-x)
        return Terms(loss, loss, rising - falling, rising + falling)

    return _pointwise(formula, x, y, observed, **common)


def binary_cross_entropy(
    x: Array,
    y: Array,
    observed: Mask,
    *,
    eps: float | None = None,
    pos_weight: Array | float = 1.0,
    **common: Any,
) -> Expected:
    """L = -(pos_weight y log p + (1 - y) log(1 - p)) of probabilities p = x.

    eps=None: each logarithm is at least -100. Otherwise p is clipped to [eps, 1 - eps].
    """

    def formula(p: Array, y: Array) -> Terms:
        with np.errstate(divide="ignore"):
            if eps is None:
                log_p, log_q = np.maximum(np.log(p), -100), np.maximum(np.log1p(-p), -100)
                rising = (1 - y) / np.maximum(1 - p, 1e-12)
                falling = pos_weight * y / np.maximum(p, 1e-12)
            else:
                # 1 - eps is never formed: its logarithm would keep no digits of eps.
                low, high = p < eps, 1 - p < eps
                inside = ~low & ~high
                log_p = np.where(low, np.log(eps), np.where(high, np.log1p(-eps), np.log(p)))
                log_q = np.where(high, np.log(eps), np.where(low, np.log1p(-eps), np.log1p(-p)))
                rising = np.where(inside, (1 - y) / (1 - p), 0.0)
                falling = np.where(inside, pos_weight * y / p, 0.0)
        loss = _positive_and_negative(y, -pos_weight * log_p, -log_q)
        return Terms(loss, loss, rising - falling, rising + falling)

    return _pointwise(formula, x, y, observed, **common)


def sigmoid_focal_loss(
    x: Array,
    y: Array,
    observed: Mask,
    *,
    alpha: Array | float | None = 0.25,
    gamma: Array | float = 2.0,
    pos_weight: Array | float = 1.0,
    **common: Any,
) -> Expected:
    """L = a CE m^gamma with m = q y + p (1 - y), a = alpha y + (1 - alpha) (1 - y)."""

    def formula(x: Array, y: Array) -> Terms:
        p, q = sigmoid(x), sigmoid(-x)
        a = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
        cross_entropy = _positive_and_negative(y, pos_weight * softplus(-x), softplus(x))
        m = q * y + p * (1 - y)
        # dm/dx = p q (1 - 2 y); p q / m is q or p where m is p or q, which may be 0.
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(y == 0, q, np.where(y == 1, p, p * q / m))
        modulation = a * m**gamma
        loss = vanishing_product(modulation, cross_entropy)
        rising, falling = (1 - y) * p, pos_weight * y * q
        turning = gamma * (1 - 2 * y) * vanishing_product(share, cross_entropy)
        return Terms(
            loss,
            loss,
            modulation * (rising - falling + turning),
            modulation * (rising + falling + np.abs(turning)),
        )

    return _pointwise(formula, x, y, observed, **common)


def asymmetric_loss(
    x: Array,
    y: Array,
    observed: Mask,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_focal: bool = False,
    **common: Any,
) -> Expected:
    """L = y q^gamma_pos sp(-x) + (1 - y) pm^gamma_neg (-log(1 - pm)), pm = max(p - clip, 0)."""

    def formula(x: Array, y: Array) -> Terms:
        p, q = sigmoid(x), sigmoid(-x)
        # p - clip without cancellation: p (1 - clip) (1 - e^(logit(clip) - x)).
        with np.errstate(divide="ignore"):
            logit = np.log(np.longdouble(clip)) - np.log1p(-np.longdouble(clip))
        above = np.maximum((x - logit).astype(np.float64), 0.0) if clip > 0 else np.inf
        pm = p * (1 - clip) * -np.expm1(-above)
        rest = np.minimum(q + clip, 1.0)  # 1 - pm
        with np.errstate(divide="ignore"):
            log_rest = np.where(pm < 0.5, -np.log1p(-np.minimum(pm, 0.5)), -np.log(rest))
        if clip == 0:
            log_rest = softplus(x)
        positive = vanishing_product(q**gamma_pos, softplus(-x))
        negative = vanishing_product(pm**gamma_neg, log_rest)

        falling = q ** (gamma_pos + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            rising = pm**gamma_neg * p * np.where(clip + q == 0, 1.0, q / rest)
            ratio = np.where(pm > 0, vanishing_product(q, log_rest) / pm, 0.0)
        if not detach_focal:
            falling = falling + gamma_pos * q**gamma_pos * vanishing_product(p, softplus(-x))
            rising = rising + gamma_neg * pm**gamma_neg * p * ratio
        rising = np.where(pm > 0, rising, 0.0)

        loss = _positive_and_negative(y, positive, negative)
        # Beside logit(clip), which is known to about 4e-16, pm is as uncertain as x - logit(clip).
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.where(pm > 0, 1 + (gamma_neg + 1) * 4e-4 * np.abs(logit) / above, 1.0)
        spread = np.where(np.isfinite(spread), spread, 1.0).astype(np.float64)
        return Terms(
            loss,
            _positive_and_negative(y, positive, negative * spread),
            (1 - y) * rising - y * falling,
            (1 - y) * rising * spread + y * falling,
        )

    return _pointwise(formula, x, y, observed, **common)


# ---- Losses per row ------------------------------------------------------------------------------


class RowTerms(NamedTuple):
    loss: float
    loss_magnitude: float
    gradient: Array  # [C]
    gradient_magnitude: Array  # [C]
    threshold_gradient: float = 0.0
    threshold_magnitude: float = 0.0


def _rowwise(
    formula: Callable[[int, Array, Array], RowTerms],
    x: Array,
    y: Array,
    observed: Mask,
    *,
    weight: Array | float = 1.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Array | float = 1.0,
) -> Expected:
    """`formula` sees the unmasked labels of a row; `weight` and `upstream` are [N] or less."""
    rows = len(x)
    factor = np.broadcast_to(np.asarray(weight, np.float64), rows)
    loss, loss_magnitude = np.zeros(rows), np.zeros(rows)
    threshold, threshold_magnitude = np.zeros(rows), np.zeros(rows)
    gradient, magnitude = np.zeros(x.shape), np.zeros(x.shape)
    for row in np.flatnonzero(factor):
        seen = observed[row]
        terms = formula(row, x[row][seen], y[row][seen])
        loss[row], loss_magnitude[row] = (
            factor[row] * terms.loss,
            factor[row] * terms.loss_magnitude,
        )
        gradient[row][seen] = factor[row] * terms.gradient
        magnitude[row][seen] = factor[row] * terms.gradient_magnitude
        threshold[row] = factor[row] * terms.threshold_gradient
        threshold_magnitude[row] = factor[row] * terms.threshold_magnitude
    reduced = reduce(loss, loss_magnitude, np.ones(rows, bool), factor, reduction, normalizer)
    outer = np.broadcast_to(reduced.scale * np.asarray(upstream), rows)
    return Expected(
        reduced.loss,
        reduced.loss_magnitude,
        gradient * outer[:, None],
        magnitude * np.abs(outer)[:, None],
        threshold * outer,
        threshold_magnitude * np.abs(outer),
    )


def _log_sum(factors: Array, z: Array) -> float:
    """log of the sum of factor * e^z; -inf for an empty sum."""
    with np.errstate(divide="ignore"):
        return float(np.logaddexp.reduce(np.log(factors) + z, initial=-np.inf))


def multilabel_categorical_crossentropy(
    x: Array, y: Array, observed: Mask, *, threshold: Array | float = 0.0, **common: Any
) -> Expected:
    """L = log(e^-s0 + sum y e^-x) + log(e^s0 + sum (1 - y) e^x); `threshold` is [N] or less."""
    thresholds = np.broadcast_to(threshold, len(x))

    def formula(row: int, x: Array, y: Array) -> RowTerms:
        s0 = thresholds[row]
        positives, negatives = y > 0, y < 1
        # LA + s0 and LB - s0: neither is smaller than 0, so their sum loses no digits.
        loss = softplus(_log_sum(y[positives], -x[positives]) + s0)
        loss = loss + softplus(_log_sum(1 - y[negatives], x[negatives]) - s0)
        falling = shares(np.append(y[positives], 1), np.append(-x[positives], -s0))
        rising = shares(np.append(1 - y[negatives], 1), np.append(x[negatives], s0))
        gradient, magnitude = np.zeros(len(x)), np.zeros(len(x))
        gradient[positives] -= falling[:-1]
        gradient[negatives] += rising[:-1]
        magnitude[positives] += falling[:-1]
        magnitude[negatives] += rising[:-1]
        return RowTerms(
            *(float(loss), float(loss), gradient, magnitude),
            *(rising[-1] - falling[-1], rising[-1] + falling[-1]),
        )

    return _rowwise(formula, x, y, observed, **common)


def multilabel_ranking_loss(x: Array, y: Array, observed: Mask, **common: Any) -> Expected:
    """L = sp(A + B), A = log sum y e^-x, B = log sum (1 - y) e^x; 0 if a sum is empty."""

    def formula(row: int, x: Array, y: Array) -> RowTerms:
        positives, negatives = y > 0, y < 1
        gradient, magnitude = np.zeros(len(x)), np.zeros(len(x))
        a = _log_sum(y[positives], -x[positives])
        b = _log_sum(1 - y[negatives], x[negatives])
        if a == -np.inf or b == -np.inf:
            return RowTerms(0.0, 0.0, gradient, magnitude)
        slope = float(sigmoid(np.asarray(a + b)))
        falling = slope * shares(y[positives], -x[positives])
        rising = slope * shares(1 - y[negatives], x[negatives])
        gradient[positives] -= falling
        gradient[negatives] += rising
        magnitude[positives] += falling
        magnitude[negatives] += rising
        loss = float(softplus(np.asarray(a + b)))
        return RowTerms(loss, loss, gradient, magnitude)

    return _rowwise(formula, x, y, observed, **common)


def multilabel_softmax_cross_entropy(
    x: Array,
    y: Array,
    observed: Mask,
    *,
    normalize_target: bool = True,
    partition: str | None = None,
    partition_weight: float = 1.0,
    **common: Any,
) -> Expected:
    """L = sum t (Z - x), Z = log sum e^x, t = y / sum(y) or y; `partition` adds the totals.

    'poisson': e^Z - sum(y) Z, so that the sum is the Poisson loss sum(e^x - y x) where t = y.
    'mse': (e^Z - sum(y))^2.
    """

    def formula(row: int, x: Array, y: Array) -> RowTerms:
        if len(x) == 0:
            return RowTerms(0.0, 0.0, np.zeros(0), np.zeros(0))
        total = y.sum()
        t = y / (total if normalize_target and total > 0 else 1.0)
        # z - x as (largest - x) + log1p(others), which keeps the digits of a confident positive.
        largest, others = x.max(), np.delete(x, x.argmax())
        beyond = np.log1p(np.exp(others - largest).sum())
        z = largest + beyond
        softmax = shares(np.ones(len(x)), x)
        distance = np.where(t > 0, largest - np.where(t > 0, x, 0.0), 0.0)
        loss = float((t * (distance + beyond)).sum())
        gradient, magnitude = t.sum() * softmax - t, t.sum() * softmax + t
        loss_magnitude = loss
        if partition == "poisson":
            loss += partition_weight * (np.exp(z) - total * z)
            loss_magnitude += partition_weight * (np.exp(z) + total * abs(z))
            gradient = gradient + partition_weight * (np.exp(z) - total) * softmax
            magnitude = magnitude + partition_weight * (np.exp(z) + total) * softmax
        elif partition == "mse":
            off = np.exp(z) - total
            loss += partition_weight * off**2
            loss_magnitude += partition_weight * abs(off) * 2 * (np.exp(z) + total)
            gradient = gradient + partition_weight * 2 * off * np.exp(z) * softmax
            magnitude = magnitude + partition_weight * 4 * (np.exp(z) + total) ** 2 * softmax
        return RowTerms(float(loss), float(loss_magnitude), gradient, magnitude)

    return _rowwise(formula, x, y, observed, **common)


def multilabel_margin_loss(
    x: Array, y: Array, observed: Mask, *, margin: float = 1.0, **common: Any
) -> Expected:
    """1 / C' sum over pairs (j positive, i not) of max(0, margin - (x_j - x_i)), pair by pair."""

    def formula(row: int, x: Array, y: Array) -> RowTerms:
        loss, size = 0.0, 0.0
        gradient, magnitude = np.zeros(len(x)), np.zeros(len(x))
        for j in np.flatnonzero(y == 1):
            for i in np.flatnonzero(y == 0):
                violation = margin - (x[j] - x[i])
                if violation > 0:
                    loss += violation / len(x)
                    size += (abs(margin) + abs(x[j] - x[i])) / len(x)
                    for label, sign in ((j, -1), (i, 1)):
                        gradient[label] += sign / len(x)
                        magnitude[label] += 1 / len(x)
        return RowTerms(loss, size, gradient, magnitude)

    return _rowwise(formula, x, y, observed, **common)


# ---- Overlap losses ------------------------------------------------------------------------------


def tversky_loss(
    x: Array,
    y: Array,
    observed: Mask,
    *,
    from_logits: bool = True,
    axis: str = "samples",
    smooth: float = 1e-5,
    alpha: float = 0.5,
    beta: float = 0.5,
    weight: Array | float = 1.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    upstream: Array | float = 1.0,
) -> Expected:
    """1 - (2 I + s) / (2 I + 2 alpha FP + 2 beta FN + s) per row, per label or altogether.

    `weight` and `upstream` have one number per row, per label, or are one number.
    """
    p = np.where(observed, sigmoid(x) if from_logits else x, 0.0)
    q = np.where(observed, sigmoid(-x) if from_logits else 1 - x, 0.0)
    y = np.where(observed, y, 0.0)
    along = {"samples": 1, "classes": 0, "micro": (0, 1)}[axis]
    missed = 2 * alpha * (p * (1 - y)).sum(along, keepdims=True)
    missed = missed + 2 * beta * (q * y).sum(along, keepdims=True)
    whole = 2 * (p * y).sum(along, keepdims=True) + missed + smooth
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(whole == 0, 0.0, missed / whole)
        inverse = np.where(whole == 0, 0.0, 1 / whole)
    # d missed / dp and d whole / dp of an element.
    missed_slope = 2 * alpha * (1 - y) - 2 * beta * y
    whole_slope = 2 * y + missed_slope
    inner = np.where(observed, p * q if from_logits else 1.0, 0.0)
    gradient = inner * (missed_slope - terms * whole_slope) * inverse
    magnitude = inner * inverse * (2 * alpha * (1 - y) + 2 * beta * y) * (1 + terms)
    magnitude = magnitude + inner * inverse * terms * 2 * y

    units = terms.shape
    factor = np.broadcast_to(np.asarray(weight, np.float64).reshape(-1), terms.size).reshape(units)
    values = factor * terms
    reduced = reduce(
        *(values.ravel(), values.ravel(), np.ones(terms.size, bool), factor.ravel()),
        *(reduction, normalizer),
    )
    outer = factor * reduced.scale
    outer = outer * np.broadcast_to(np.asarray(upstream).reshape(-1), terms.size).reshape(units)
    return Expected(
        reduced.loss, reduced.loss_magnitude, outer * gradient, np.abs(outer) * magnitude
    )


def dice_loss(x: Array, y: Array, observed: Mask, **options: Any) -> Expected:
    """1 - (2 I + s) / (P + T + s): false positives and negatives each count half."""
    return tversky_loss(x, y, observed, alpha=0.5, beta=0.5, **options)
