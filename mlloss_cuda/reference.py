"""The losses in plain PyTorch: specification, and fallback where nothing native serves.

The losses take the same checked arguments as those of ``ops.py``. They work in fp32 (fp64 for fp64
input) and build dense temporaries of shape ``[N, C]``; the native kernels compute the same numbers
without them. The losses at the end have no kernels: they serve every device.

Nothing here cancels and nothing is multiplied by a mask. Where autograd would differentiate a
formula inaccurately, a constant (``detach``) carries the value and a term that is 0, or a factor
that is 1, carries the derivatives, all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ranks import ALONE, Ranks
from .targets import OBSERVED, PACKED, SPARSE, Labels, PackedLabels, SparseLabels, row_of_entry


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic and of the loss: fp64 for fp64 input, fp32 otherwise."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


# ---- Targets and masks ---------------------------------------------------------------------------


def dense_target(
    labels: Labels, num_labels: int, dtype: torch.dtype, ignore_index: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the target as ``[N, C]`` numbers and the elements that it leaves in, None for all.

    What is no valid target (outside [0, 1], or every element of a row with a bad index) is NaN.
    """
    if labels.format == PACKED:
        return PackedLabels(labels.data, num_labels).unpack().to(dtype), None
    if labels.format == SPARSE:
        return _dense_from_sparse(labels, num_labels, dtype), None
    if labels.format == OBSERVED:
        listed = _dense_from_sparse(labels._replace(values=None), num_labels, dtype)
        target = _dense_from_sparse(labels, num_labels, dtype)
        return target, listed != 0  # NaN, in rows with a bad index, is not 0
    target = labels.data
    observed = None
    if ignore_index is not None:
        observed = ~target.isnan() if math.isnan(ignore_index) else target != ignore_index
    target = target.to(dtype)
    return torch.where((target >= 0) & (target <= 1), target, math.nan), observed


def dense_mask(labels: Labels | None, num_labels: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask as ``[N, C]`` bool, and ``[N]`` bool: rows whose sparse mask is bad."""
    if labels is None:
        return None, None
    if labels.format == PACKED:
        return PackedLabels(labels.data, num_labels).unpack(), None
    if labels.format == SPARSE:
        marks = _dense_from_sparse(labels, num_labels, torch.float32)
        bad = marks.isnan().any(dim=1)
        return (marks != 0) | bad[:, None], bad
    return labels.data != 0, None


def _dense_from_sparse(labels: Labels, num_labels: int, dtype: torch.dtype) -> Tensor:
    assert labels.offsets is not None
    indices, offsets = labels.data, labels.offsets
    rows, inside = row_of_entry(SparseLabels(indices, offsets))
    num_rows, width = offsets.shape[0] - 1, num_labels + 1
    dense = torch.zeros(max(num_rows, 1) * width, dtype=dtype, device=indices.device)
    values = torch.ones_like(indices, dtype=dtype)
    if labels.values is not None:
        values = labels.values.to(dtype)
        # NaN wins over every other value of the same label, as in the kernels.
        values = torch.where((values >= 0) & (values <= 1), values, math.inf)
    in_range = inside & (indices >= 0) & (indices < num_labels)
    columns = torch.where(in_range, indices, num_labels).long()
    values = torch.where(inside & (indices >= 0), values, 0.0)
    values = torch.where(inside & (indices >= num_labels), math.inf, values)
    dense = dense.scatter_reduce(0, rows * width + columns, values, "amax")
    dense = dense.view(-1, width)[:num_rows]
    # The extra column collects the entries that name no label: infinite where one is out of range.
    # Entries cannot be told apart by row where offsets do not rise: all rows are bad then.
    rises = (offsets[1:] >= offsets[:-1]).all()
    bad_offsets = ~rises | (offsets[0] < 0) | (offsets[-1] > indices.shape[0])
    bad = dense[:, num_labels].isinf() | bad_offsets
    dense = dense[:, :num_labels]
    return torch.where(bad[:, None] | dense.isinf(), math.nan, dense)


class Elements(NamedTuple):
    """What a loss is computed from, ``[N, C]``.

    Attributes:
        x: input in the dtype of the arithmetic, 0 where it is not used.
        y: target in [0, 1], NaN where it is invalid, 0 where it is not used.
        observed: elements that are not masked; None for all.
    """

    x: Tensor
    y: Tensor
    observed: Tensor | None


def used_elements(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    ignore_index: float | None,
    weight: Tensor | None = None,
) -> Elements:
    """Return dense input and target: without what is masked or (``[N, C]``) of weight 0."""
    dtype, num_labels = compute_dtype(input), input.shape[1]
    y, observed = dense_target(target, num_labels, dtype, ignore_index)
    selected, bad_rows = dense_mask(mask, num_labels)
    if selected is not None:
        observed = selected if observed is None else observed & selected
    if bad_rows is not None:
        y = torch.where(bad_rows[:, None], math.nan, y)
    x = input.to(dtype)
    used = observed
    if weight is not None:
        used = weight != 0 if used is None else used & (weight != 0)
    if used is not None:
        x = torch.where(used, x, 0.0)
        y = torch.where(used, y, 0.0)
    return Elements(x, y, observed)


# ---- Shared formulas -----------------------------------------------------------------------------

# Beyond these logits p or 1 - p is 0 in every dtype, and a product with an infinite loss is NaN.
_FAR = 1000.0


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)), exact in both tails, with gradient sigmoid(x)."""
    # Above the threshold, x itself is exact in fp64 too.
    return torch.nn.functional.softplus(x, threshold=50.0)


def within_reach(x: Tensor) -> Tensor:
    """Replace logits of no further effect on p by constants, so that p has gradient 0 there."""
    return torch.where(x.abs() > _FAR, x.detach().clamp(-_FAR, _FAR), x)


def sigmoid(x: Tensor) -> Tensor:
    """Compute p with an accurate gradient p q; torch takes 1 - p for q, and loses it near p = 1.

    Args:
        x: finite.
    """
    logarithm = softplus(-x)  # -log p
    return torch.sigmoid(x.detach()) * (logarithm.detach() - logarithm).exp()


def power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """Compute base^exponent for a base in [0, 1] and an exponent >= 0, with finite gradients.

    A base that has (almost) underflown is a constant: it is a factor of a loss that is 0 there.
    """
    constant = base < torch.finfo(base.dtype).tiny
    inner = torch.where(constant, 1.0, base)
    return torch.where(constant, base.detach() ** exponent, inner**exponent)


def valid_constant(constant: Tensor, dtype: torch.dtype, largest: float = math.inf) -> Tensor:
    """Convert a weight or the like; what lies outside [0, largest] becomes NaN."""
    constant = constant.to(dtype)
    return torch.where((constant >= 0) & (constant <= largest), constant, math.nan)


def mixed(positive: Tensor, negative: Tensor, y: Tensor) -> Tensor:
    """Return y positive + (1 - y) negative, where a term of factor 0 may be infinite."""
    return torch.where(y == 0, 0.0, y * positive) + torch.where(y == 1, 0.0, (1 - y) * negative)


def smoothed(y: Tensor, label_smoothing: float) -> Tensor:
    """Move the target towards 1/2."""
    return y * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing != 0 else y


def log_sum_beside(own: Tensor, values: Tensor, factors: Tensor, ranks: Ranks) -> Tensor:
    """Return log(e^own + sum of factor e^value) - own per row, exact also where it is close to 0.

    Args:
        own: ``[N]``. What is subtracted is a constant to autograd: it cancels in the loss.
        values: ``[N, C]``.
        factors: ``[N, C]``, constants in [0, 1]; 0 leaves a value out.
        ranks: those that have the values of other labels.
    """
    base = own.detach()
    values = torch.where(factors == 0, -math.inf, values - base[:, None])
    # Shifted by an exact maximum, so that gradients do not feel the rounding of the logarithm.
    largest = torch.cat([values.detach(), torch.zeros_like(base)[:, None]], dim=1).amax(dim=1)
    largest = ranks.largest(largest)
    largest = torch.where(largest.isinf(), 0.0, largest)
    others = ranks.add((factors * (values - largest[:, None]).exp()).sum(dim=1), "labels")
    # exp() - 1 is exact where it has to be, at largest = 0, and differentiates better than expm1.
    return largest + torch.log1p(others + ((own - base - largest).exp() - 1))


def reduce_loss(
    loss: Tensor,
    observed: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
    ranks: Ranks = ALONE,
    over: str = "rows",
) -> Tensor:
    """Weigh and reduce an unweighted `loss` that is finite where not `observed` or of weight 0.

    Args:
        loss: ``[N, C]`` (pointwise) or ``[N]`` (row losses).
        observed: mask of the same shape, or None for everything.
        weight: broadcast to the same shape, or None for one.
        reduction: see :func:`mlloss_cuda.sigmoid_cross_entropy`.
        normalizer: 0-d denominator that replaces the one of `reduction`.
        ranks: those that have other losses.
        over: what each of them has others of, see :meth:`Ranks.add`.
    """
    return reduced(loss, observed, weight, reduction, normalizer, ranks, over)[0]


def reduced(
    loss: Tensor,
    observed: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
    ranks: Ranks,
    over: str,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`reduce_loss` does, and its derivative by the weighed losses: 0-d fp64."""
    one = torch.ones((), dtype=torch.float64, device=loss.device)
    if weight is not None:
        weight = valid_constant(weight, loss.dtype)
        if observed is not None:
            weight = torch.where(observed, weight, 0.0)
        loss = weight * loss
    if reduction == "none":
        return loss, one
    # Sums in fp64, as the kernels do.
    total = loss.sum(dtype=torch.float64)
    if normalizer is not None:
        valid = (normalizer >= 0) & (normalizer < math.inf)
        denominator = torch.where(valid, normalizer.to(torch.float64), math.nan)
        total = ranks.add(total, over)
    elif reduction == "sum":
        return ranks.add(total, over).to(loss.dtype), one
    elif reduction == "batchmean":
        rows = total.new_full((), loss.shape[0])
        denominator = ranks.add(rows, "rows" if over == "elements" else over)
        total = ranks.add(total, over)
    else:
        total, denominator = ranks.add_each(total, counted(loss, observed, weight, reduction), over)
    # A zero denominator gives loss 0 with gradient 0; the inner select keeps NaN out of backward.
    empty = denominator == 0
    denominator = torch.where(empty, 1.0, denominator)
    mean = torch.where(empty, 0.0, total / denominator).to(loss.dtype)
    return mean, torch.where(empty, 0.0, 1 / denominator)


def counted(loss: Tensor, observed: Tensor | None, weight: Tensor | None, reduction: str) -> Tensor:
    """Return what 'mean', 'mean_nonzero' or 'weighted_mean' divide by: 0-d fp64.

    The arguments are those of :func:`reduce_loss`, but `weight` is 0 where not `observed`.
    """
    if reduction == "mean" or weight is None:
        if observed is None:
            return torch.full((), loss.numel(), dtype=torch.float64, device=loss.device)
        return observed.sum().to(torch.float64)
    if reduction == "mean_nonzero":
        return (weight != 0).sum().to(torch.float64)
    return weight.sum(dtype=torch.float64)


def _reduce_elements(
    loss: Tensor,
    elements: Elements,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
    ranks: Ranks,
) -> Tensor:
    """Reduce a pointwise loss, from which the elements that are not used are taken out first."""
    used = elements.observed
    if weight is not None:
        used = weight != 0 if used is None else used & (weight != 0)
    if used is not None:
        loss = torch.where(used, loss, 0.0)
    return reduce_loss(loss, elements.observed, weight, reduction, normalizer, ranks, "elements")


# ---- Pointwise losses ----------------------------------------------------------------------------


def sigmoid_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = pos_weight y softplus(-x) + (1 - y) softplus(x), selected by the mask, then reduced."""
    elements = used_elements(input, target, mask, ignore_index, weight)
    x, y = elements.x, smoothed(elements.y, label_smoothing)
    positive = softplus(-x)
    if pos_weight is not None:
        positive = valid_constant(pos_weight, x.dtype) * positive
    loss = mixed(positive, softplus(x), y)
    return _reduce_elements(loss, elements, weight, reduction, normalizer, ranks)


def _probability(p: Tensor) -> Tensor:
    """Turn what lies outside [0, 1] into NaN, and its gradient too."""
    return p * torch.where((p >= 0) & (p <= 1), 1.0, math.nan)


# As torch does: logarithms of probabilities end here, and their gradients at the reciprocal.
_SMALLEST_LOG = -100.0
_SMALLEST_DIVISOR = 1e-12


def _clamped_logs(p: Tensor) -> tuple[Tensor, Tensor]:
    """Log p and log(1 - p), at least -100, with gradients of at most 1e12."""
    constant = p.detach()
    low, high = constant <= _SMALLEST_DIVISOR, 1 - constant <= _SMALLEST_DIVISOR
    slope = (p - constant) / _SMALLEST_DIVISOR  # 0, but for its gradient
    log_p = torch.where(
        low,
        constant.log().clamp(min=_SMALLEST_LOG) + slope,
        torch.where(low, 1.0, p).log(),
    )
    log_q = torch.where(
        high,
        (-constant).log1p().clamp(min=_SMALLEST_LOG) - slope,
        (-torch.where(high, 0.0, p)).log1p(),
    )
    return log_p, log_q


def _clipped_logs(p: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Log p and log(1 - p) of p clipped to [eps, 1 - eps], without rounding 1 - eps."""
    low, high = p < eps, 1 - p < eps
    inner = torch.where(low | high, 0.5, p)
    near, far = math.log1p(-eps), math.log(eps)
    log_p = torch.where(low, far, torch.where(high, near, inner.log()))
    log_q = torch.where(low, near, torch.where(high, far, (-inner).log1p()))
    return log_p, log_q


def binary_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    eps: float | None,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = -pos_weight y log p - (1 - y) log(1 - p) of probabilities p = input."""
    elements = used_elements(input, target, mask, ignore_index, weight)
    p, y = elements.x, smoothed(elements.y, label_smoothing)
    p = _probability(p)
    log_p, log_q = _clamped_logs(p) if eps is None else _clipped_logs(p, eps)
    if pos_weight is not None:
        log_p = valid_constant(pos_weight, p.dtype) * log_p
    loss = mixed(-log_p, -log_q, y)
    return _reduce_elements(loss, elements, weight, reduction, normalizer, ranks)


def sigmoid_focal_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha: Tensor | float | None,
    gamma: Tensor | float,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = (alpha y + (1 - alpha) (1 - y)) m^gamma CE, m = y q + (1 - y) p; CE with pos_weight."""
    elements = used_elements(input, target, mask, ignore_index, weight)
    x, y = elements.x, smoothed(elements.y, label_smoothing)
    positive, negative = softplus(-x), softplus(x)
    if pos_weight is not None:
        positive = valid_constant(pos_weight, x.dtype) * positive
    near = within_reach(x)
    if isinstance(gamma, Tensor):
        gamma = valid_constant(gamma, x.dtype)
    factor = power(y * sigmoid(-near) + (1 - y) * sigmoid(near), gamma)
    if alpha is not None:
        if isinstance(alpha, Tensor):
            alpha = valid_constant(alpha, x.dtype, 1.0)
        factor = (alpha * y + (1 - alpha) * (1 - y)) * factor
    # A factor of 0 wins against an infinite loss.
    loss = torch.where(factor == 0, 0.0, factor * mixed(positive, negative, y))
    return _reduce_elements(loss, elements, weight, reduction, normalizer, ranks)


def _above_clip(x: Tensor, p: Tensor, clip: float) -> Tensor:
    """max(p - clip, 0), where p - clip would cancel: p (1 - clip) (1 - e^(logit(clip) - x))."""
    logit = math.log(clip) - math.log1p(-clip)
    # Its leading 24 bits, which fp32 holds, and the rest.
    shifted = logit * (2.0**29 + 1)
    high = shifted - (shifted - logit)
    distance = (x.detach() - high) - (logit - high)
    value = p.detach() * (1 - clip) * -torch.expm1(-distance)
    return torch.where(distance <= 0, 0.0, value + (p - p.detach()))


def asymmetric_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    detach_focal: bool,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = y q^gp softplus(-x) - (1 - y) pm^gn log(1 - pm), pm = max(p - clip, 0)."""
    elements = used_elements(input, target, mask, ignore_index, weight)
    x, y = elements.x, smoothed(elements.y, label_smoothing)
    near = within_reach(x)
    p, q = sigmoid(near), sigmoid(-near)
    if clip > 0:
        shifted = _above_clip(near, p, clip)
        negative = torch.log1p(shifted / (q + clip))  # 1 - pm = q + clip
    else:
        shifted, negative = p, softplus(x)
    positive_factor, negative_factor = power(q, gamma_pos), power(shifted, gamma_neg)
    if detach_focal:
        positive_factor, negative_factor = positive_factor.detach(), negative_factor.detach()
    loss = mixed(positive_factor * softplus(-x), negative_factor * negative, y)
    return _reduce_elements(loss, elements, weight, reduction, normalizer, ranks)


# ---- Row-wise losses -----------------------------------------------------------------------------


def _sides(elements: Elements) -> tuple[Tensor, Tensor]:
    """Return the factors y of e^-x and 1 - y of e^x, 0 where an element is not used."""
    positives, negatives = elements.y, 1 - elements.y
    if elements.observed is not None:
        negatives = torch.where(elements.observed, negatives, 0.0)
    return positives, negatives


def _per_label(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight[:, None]


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    threshold: Tensor,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = log(e^-s0 + sum y e^-x) + log(e^s0 + sum (1 - y) e^x), both sums over unmasked labels.

    Computed relative to -s0 and s0, which cancel: the digits of small losses are kept.
    """
    elements = used_elements(input, target, mask, ignore_index, _per_label(weight))
    positives, negatives = _sides(elements)
    x = elements.x
    loss = log_sum_beside(-threshold, -x, positives, ranks)
    loss = loss + log_sum_beside(threshold, x, negatives, ranks)
    return reduce_loss(loss, None, weight, reduction, normalizer, ranks)


def _scaled_sum(values: Tensor, factors: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Return M = max value and S with sum of factor e^value = e^M S, over factors above 0.

    M is a constant to autograd, -inf for an empty sum.
    """
    values = torch.where(factors == 0, -math.inf, values)
    padded = torch.nn.functional.pad(values.detach(), (0, 1), value=-math.inf)
    largest = ranks.largest(padded.amax(dim=1))
    shift = torch.where(largest.isinf(), 0.0, largest)[:, None]
    # An infinite value leaves the others behind.
    infinite = largest[:, None] == math.inf
    values = torch.where(infinite, torch.where(values == math.inf, 0.0, -math.inf), values)
    return largest, ranks.add((factors * (values - shift).exp()).sum(dim=1), "labels")


# Up to this s, log(1 + e^s) is computed from e^s, above it from s.
_LARGE_EXPONENT = 40.0


def multilabel_ranking_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = log(1 + (sum y e^-x) (sum (1 - y) e^x)), both sums over unmasked labels."""
    elements = used_elements(input, target, mask, ignore_index, _per_label(weight))
    positives, negatives = _sides(elements)
    a, positive_sum = _scaled_sum(-elements.x, positives, ranks)
    b, negative_sum = _scaled_sum(elements.x, negatives, ranks)
    empty = (a == -math.inf) | (b == -math.inf)
    invalid = a.isnan() | b.isnan() | positive_sum.isnan() | negative_sum.isnan()
    a, b = torch.where(empty, 0.0, a), torch.where(empty, 0.0, b)
    # What rounding the sum drops is a relative error of e^sum; it matters where that is not huge.
    exponent = a + b
    rounded = exponent - a
    dropped = (a - (exponent - rounded)) + (b - rounded)
    dropped = torch.where(exponent.abs() > _LARGE_EXPONENT, 0.0, dropped)
    product = torch.where(empty, 1.0, positive_sum * negative_sum) * (1 + dropped)
    small = torch.log1p(exponent.clamp(max=_LARGE_EXPONENT).exp() * product)
    large = exponent + (product.log() + torch.log1p((-exponent.clamp(min=0)).exp() / product))
    loss = torch.where(exponent > _LARGE_EXPONENT, large, small)
    # Without positives or without negatives there is no pair; NaN on the other side still counts.
    loss = torch.where(empty, torch.where(invalid, math.nan, 0.0).to(loss.dtype), loss)
    return reduce_loss(loss, None, weight, reduction, normalizer, ranks)


# ---- Rows of which there is a part at a time -----------------------------------------------------


def denominator(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    ignore_index: float | None,
    reduction: str,
) -> Tensor:
    """Return what a pointwise loss is divided by in `reduction`: 0-d fp64."""
    _, _, observed = used_elements(input, target, mask, ignore_index)
    if weight is not None:
        weight = valid_constant(weight, compute_dtype(input))
        if observed is not None:
            weight = torch.where(observed, weight, 0.0)
    return counted(input, observed, weight, reduction)


def row_sums(
    input: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> Tensor:
    """Return A, S, B, T ``[N, 4]``: sum y e^-x = e^A S and sum (1 - y) e^x = e^B T of each row.

    A and B are finite; an empty sum is 0, an infinite one inf.
    """
    elements = used_elements(input, target, mask, ignore_index)
    columns = []
    for values, factors in zip((-elements.x, elements.x), _sides(elements), strict=True):
        largest, total = _scaled_sum(values, factors)
        columns.append(torch.where(largest.isinf(), 0.0, largest))
        columns.append(torch.where(largest == math.inf, math.inf, total))
    return torch.stack(columns, dim=1)


def zlpr_gradient_over(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    ignore_index: float | None,
    statistics: Tensor,
    grad_rows: Tensor,
) -> None:
    """Write g (-y k e^(-x - m) + (1 - y) l e^(x - n)) over the logits x of each row.

    Args:
        input: logits.
        target: as in the losses.
        mask: as in the losses.
        ignore_index: as in the losses.
        statistics: m, k, n, l of each row, ``[N, 4]``; m and n are not less than any -x and x.
        grad_rows: g, ``[N]``.
    """
    elements = used_elements(input, target, mask, ignore_index, grad_rows[:, None])
    shift, factor, negative_shift, negative_factor = statistics.unbind(dim=1)
    positives, negatives = _sides(elements)
    x, g = elements.x, grad_rows[:, None]
    positive = -(g * factor[:, None]) * positives * (-x - shift[:, None]).exp()
    negative = (g * negative_factor[:, None]) * negatives * (x - negative_shift[:, None]).exp()
    gradient = torch.where(positives == 0, 0.0, positive)
    gradient += torch.where(negatives == 0, 0.0, negative)
    input.copy_(torch.where(g == 0, 0.0, gradient))


# ---- Losses without kernels ----------------------------------------------------------------------


def multilabel_softmax_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    normalize_target: bool,
    partition: str | None,
    partition_weight: float,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = sum t (LSE(x) - x), t = y / sum y or y, plus a loss of the total Z = sum e^x.

    'poisson': Z - sum(y) log Z; 'mse': (Z - sum(y))^2.
    """
    elements = used_elements(input, target, mask, ignore_index, _per_label(weight))
    x, y, observed = elements
    if observed is not None:
        x = torch.where(observed, x, -math.inf)
    # Relative to the largest logit, which is left out of sums: nothing cancels, neither in
    # LSE(x) - x = (largest - x) + log1p(others) nor in the gradient of a confident positive. Its
    # own derivatives are those of `rise`, which is 0; one rank has it.
    own, is_largest = _largest_of_rows(x)
    largest, is_here = ranks.first_largest(own)
    is_largest = is_largest & is_here[:, None]
    empty = largest == -math.inf
    largest = torch.where(empty, 0.0, largest)
    rise = torch.where(is_largest & ~x.isinf(), x - x.detach(), 0.0)
    rise = rise.sum(dim=1, dtype=torch.float64)
    below = torch.where(is_largest, -math.inf, x) - largest[:, None]
    others = ranks.add(below.exp().sum(dim=1, dtype=torch.float64), "labels") * (-rise).exp()
    own_total = y.sum(dim=1, dtype=torch.float64)
    total = ranks.add(own_total, "labels")
    divisor = torch.where(total > 0, total, 1.0) if normalize_target else 1.0
    costs = torch.where(is_largest | (y == 0), 0.0, y * -below).sum(dim=1, dtype=torch.float64)
    of_largest = torch.where(is_largest, y, 0.0).sum(dim=1, dtype=torch.float64)
    costs = ranks.add(costs, "labels") + (total - of_largest) * rise
    log_others = others.log1p()
    loss = (costs + total * log_others) / divisor
    if partition is not None:
        sum_of_exponentials = ranks.add(x.exp().sum(dim=1, dtype=torch.float64), "labels")
        if partition == "poisson":
            logarithm = largest.to(torch.float64) + rise + log_others
            term = sum_of_exponentials - torch.where(total == 0, 0.0, total * logarithm)
            # The exponential outgrows its logarithm.
            term = torch.where(sum_of_exponentials.isinf(), sum_of_exponentials, term)
        else:
            term = (sum_of_exponentials - total) ** 2
        loss = loss + partition_weight * term
    # Nothing but logits of -inf: no distribution gives a positive there.
    impossible = torch.where(total > 0, math.inf, 0.0)
    if observed is not None:
        some = ranks.add(observed.any(dim=1).to(torch.float64), "labels") > 0
        impossible = torch.where(some, impossible, 0.0)
    loss = torch.where(empty, impossible, loss).to(x.dtype)
    return reduce_loss(loss, None, weight, reduction, normalizer, ranks)


def _largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row ``[N]``, -inf without labels, and where it is ``[N, C]``."""
    is_largest = torch.zeros_like(x, dtype=torch.bool)
    if x.shape[1] == 0:
        return torch.full_like(x.sum(dim=1), -math.inf).detach(), is_largest
    largest, place = x.detach().max(dim=1, keepdim=True)
    return largest[:, 0], is_largest.scatter(1, place, True)


def multilabel_margin_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    margin: float,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = 1/C sum over (j positive, i negative) of max(0, margin - (x_j - x_i)).

    With keys x_j - margin and x_i, a pair costs the distance from its positive up to its negative.
    In sorted order, each gap between neighbouring keys is part of that distance for (positives
    below) x (negatives above) pairs: a sum of terms that are not negative, from one sort.
    """
    elements = used_elements(input, target, mask, ignore_index, _per_label(weight))
    y = elements.y
    keys = elements.x.to(torch.float64)
    is_positive, is_negative = y == 1, y == 0
    bad = ~(is_positive | is_negative) | keys.isnan()
    size = y.new_full((y.shape[0],), y.shape[1])
    if elements.observed is not None:
        is_negative = is_negative & elements.observed
        size = elements.observed.sum(dim=1).to(y.dtype)
    keys = torch.where(is_positive, keys - margin, keys)
    if ranks.labels is not None:
        # All positives, and the negatives of this rank.
        size, bad = ranks.add(size, "labels"), ranks.add(bad.any(dim=1).double(), "labels") > 0
        bad = bad[:, None]
        keys, is_positive, is_negative = _beside_all_positives(
            keys, is_positive, is_negative, ranks
        )
    # Negatives come first among equals: a pair that meets the margin exactly has no gradient.
    order = is_positive.to(torch.uint8).argsort(dim=1, stable=True)
    order = order.gather(1, keys.detach().gather(1, order).argsort(dim=1, stable=True))
    ordered = keys.gather(1, order)
    below = is_positive.gather(1, order).to(torch.float64).cumsum(dim=1)
    negatives = is_negative.gather(1, order).to(torch.float64)
    above = negatives.sum(dim=1, keepdim=True) - negatives.cumsum(dim=1)
    pairs = (below * above)[:, :-1]
    # A gap can be infinite where no pair spans it.
    gaps = torch.where(pairs == 0, 0.0, ordered[:, 1:] - ordered[:, :-1])
    loss = ranks.add((gaps * pairs).sum(dim=1), "labels")
    # Also the gradient of a row with something invalid is NaN.
    bad = bad.any(dim=1)
    invalid = torch.where(bad[:, None], keys, 0.0) * math.nan
    loss = torch.where(bad, invalid.sum(dim=1) + math.nan, loss)
    loss = (loss / size.clamp(min=1)).to(y.dtype)
    return reduce_loss(loss, None, weight, reduction, normalizer, ranks)


def _beside_all_positives(
    keys: Tensor, is_positive: Tensor, is_negative: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the positives of all label shards before the labels of this one, which are negatives.

    As many places as the row with the most positives needs: the one thing here that a GPU is
    waited for.
    """
    most = int(ranks.largest(is_positive.sum(dim=1).amax(keepdim=True)) if len(keys) else 0)
    order = is_positive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    filler = most - order.shape[1]
    own = torch.nn.functional.pad(keys.gather(1, order), (0, filler))
    marks = torch.nn.functional.pad(is_positive.gather(1, order).to(keys.dtype), (0, filler))
    positives, marks = ranks.with_others(own), ranks.with_others(marks)
    # Places without a positive are in no pair, wherever they come in the order.
    positives = torch.where(marks != 0, positives, 0.0)
    return (
        torch.cat([positives, keys], dim=1),
        torch.cat([marks != 0, torch.zeros_like(is_positive)], dim=1),
        torch.cat([torch.zeros_like(marks, dtype=torch.bool), is_negative], dim=1),
    )


# Of each axis: the dimensions that are summed, what ranks have others of in these sums, and in what
# is left.
_TVERSKY_AXES = {
    "samples": ((1,), "labels", "rows"),
    "classes": ((0,), "rows", "labels"),
    "micro": ((0, 1), "elements", "nothing"),
}


def tversky_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    from_logits: bool,
    axis: str,
    smooth: float,
    alpha: float,
    beta: float,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    ranks: Ranks = ALONE,
) -> Tensor:
    """L = 1 - (2 I + s) / (2 I + 2 alpha FP + 2 beta FN + s), without the subtraction.

    I = sum p y, FP = sum p (1 - y), FN = sum (1 - p) y along `axis`. `weight` has one value for
    each unit that is left: per row (samples), per label (classes) or ``[1]`` (micro).
    """
    along, summed, left = _TVERSKY_AXES[axis]
    per_element = weight
    if weight is not None:
        per_element = weight[:, None] if axis == "samples" else weight
        per_element = per_element.expand(input.shape)
    elements = used_elements(input, target, mask, ignore_index, per_element)
    x, y, observed = elements
    if from_logits:
        near = within_reach(x)
        p, q = sigmoid(near), sigmoid(-near)
    else:
        p = _probability(x)
        q = 1 - p
    if observed is not None:
        p, q = torch.where(observed, p, 0.0), torch.where(observed, q, 0.0)
    sums = [part.sum(along, dtype=torch.float64) for part in (p * y, p * (1 - y), q * y)]
    overlap, false_positives, false_negatives = ranks.add(torch.stack(sums), summed)
    missed = 2 * (alpha * false_positives + beta * false_negatives)
    whole = 2 * overlap + missed + smooth
    empty = whole == 0
    loss = torch.where(empty, 0.0, missed / torch.where(empty, 1.0, whole))
    loss = loss.to(x.dtype).reshape(-1)
    return reduce_loss(loss, None, weight, reduction, normalizer, ranks, left)


# ---- Logits of which other ranks have other labels, or other rows --------------------------------


class OverRanks:
    """The losses of this module, of what all ranks have."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        return functools.partial(globals()[name], ranks=self._ranks)
