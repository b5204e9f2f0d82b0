"""The losses in plain PyTorch: specification, fallback where nothing native serves, and oracle.

Every function takes checked arguments (``functional.py`` checks them), works in fp32 (fp64 for fp64
input) and builds dense temporaries of shape ``[N, C]``; the native kernels compute the same numbers
without them. Called with fp64 tensors these functions are what all kernels are tested against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .targets import SPARSE, Labels, SparseLabels, row_of_entry


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic and of the loss: fp64 for fp64 input, fp32 otherwise."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def dense_target(
    labels: Labels, num_labels: int, dtype: torch.dtype, ignore_index: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the target as ``[N, C]`` numbers and the elements that `ignore_index` leaves in.

    What is no valid target (outside [0, 1], or every element of a row with a bad index) is NaN.
    """
    if labels.format == SPARSE:
        return _dense_from_sparse(labels, num_labels, dtype), None
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
    if labels.format == SPARSE:
        marks = _dense_from_sparse(labels, num_labels, torch.float32)
        bad = marks.isnan().any(dim=1)
        return (marks != 0) | bad[:, None], bad
    return labels.data != 0, None


def _dense_from_sparse(labels: Labels, num_labels: int, dtype: torch.dtype) -> Tensor:
    assert labels.offsets is not None
    indices, offsets = labels.data, labels.offsets
    rows = row_of_entry(SparseLabels(indices, offsets))
    num_rows, width = offsets.shape[0] - 1, num_labels + 1
    dense = torch.zeros(max(num_rows, 1) * width, dtype=dtype, device=indices.device)
    values = torch.ones_like(indices, dtype=dtype)
    if labels.values is not None:
        values = labels.values.to(dtype)
        # NaN wins over every other value of the same label, as in the kernels.
        values = torch.where((values >= 0) & (values <= 1), values, math.inf)
    columns = torch.where((indices >= 0) & (indices < num_labels), indices, num_labels).long()
    values = torch.where(indices < 0, 0.0, values)
    values = torch.where(indices >= num_labels, math.inf, values)
    dense = dense.scatter_reduce(0, rows * width + columns, values, "amax")
    dense = dense.view(-1, width)[:num_rows]
    # The extra column collects the entries that name no label: infinite where one is out of range.
    lower, upper = offsets[:-1], offsets[1:]
    bad_offsets = (lower < 0) | (lower > upper) | (upper > indices.shape[0])
    bad = dense[:, num_labels].isinf() | bad_offsets
    dense = dense[:, :num_labels]
    return torch.where(bad[:, None] | dense.isinf(), math.nan, dense)


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)), exact in both tails, with gradient sigmoid(x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log_sum_exp(terms: Tensor) -> Tensor:
    """Return the log-sum-exp of each row ``[N, C]``; rows of -inf give -inf, with gradient 0."""
    # Rows of -inf are replaced before the function whose gradient would be NaN there.
    empty = (terms == -math.inf).all(dim=1)
    sums = torch.where(empty[:, None], 0.0, terms).logsumexp(1)
    return torch.where(empty, -math.inf, sums)


def reduce_loss(
    loss: Tensor,
    observed: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    """Weigh and reduce an unweighted `loss` that is 0 where not `observed`.

    Args:
        loss: ``[N, C]`` (pointwise) or ``[N]`` (row losses).
        observed: mask of the same shape, or None for everything.
        weight: broadcast to the same shape, or None for one.
        reduction: see :func:`mlloss_cuda.sigmoid_cross_entropy`.
        normalizer: 0-d denominator that replaces the one of `reduction`.
    """
    if weight is not None:
        weight = weight.to(loss.dtype)
        weight = torch.where(weight >= 0, weight, math.nan)
        if observed is not None:
            weight = torch.where(observed, weight, 0.0)
        # Selected, so that a weight of zero silences a loss that is not finite.
        loss = torch.where(weight == 0, 0.0, weight * loss)
    if reduction == "none":
        return loss
    # Sums in fp64, as the kernels do.
    total = loss.sum(dtype=torch.float64)
    if normalizer is not None:
        denominator = normalizer.to(torch.float64)
    elif reduction == "sum":
        return total.to(loss.dtype)
    elif reduction == "batchmean":
        denominator = total.new_full((), loss.shape[0])
    elif reduction == "mean" or weight is None:
        count = total.new_full((), loss.numel()) if observed is None else observed.sum()
        denominator = count.to(torch.float64)
    elif reduction == "mean_nonzero":
        denominator = (weight != 0).sum().to(torch.float64)
    else:  # weighted_mean
        denominator = weight.sum(dtype=torch.float64)
    # A zero denominator gives loss 0 with gradient 0; the inner select keeps NaN out of backward.
    empty = denominator == 0
    mean = total / torch.where(empty, 1.0, denominator)
    return torch.where(empty, 0.0, mean).to(loss.dtype)


def sigmoid_cross_entropy(
    input: Tensor,
    target: Labels,
    *,
    mask: Labels | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: float | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    """L = pos_weight y softplus(-x) + (1 - y) softplus(x), selected by the mask, then reduced."""
    dtype, num_labels = compute_dtype(input), input.shape[1]
    y, observed = dense_target(target, num_labels, dtype, ignore_index)
    selected, bad_rows = dense_mask(mask, num_labels)
    if selected is not None:
        observed = selected if observed is None else observed & selected
    x = input.to(dtype)
    if bad_rows is not None:
        y = torch.where(bad_rows[:, None], math.nan, y)
    if observed is not None:
        x = torch.where(observed, x, 0.0)
        y = torch.where(observed, y, 0.0)
    y = y * (1 - label_smoothing) + label_smoothing / 2
    positive = torch.where(y > 0, y * softplus(-x), y * 0)
    if pos_weight is not None:
        positive = positive * torch.where(pos_weight >= 0, pos_weight, math.nan).to(dtype)
    negative = torch.where(y < 1, (1 - y) * softplus(x), y * 0)
    loss = positive + negative
    if observed is not None:
        loss = torch.where(observed, loss, 0.0)
    return reduce_loss(loss, observed, weight, reduction, normalizer)


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Labels,
    *,
    threshold: Tensor,
    mask: Labels | None,
    weight: Tensor | None,
    ignore_index: float | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    """L = log(e^-s0 + sum y e^-x) + log(e^s0 + sum (1 - y) e^x), both sums over unmasked labels.

    Computed as softplus(A + s0) + softplus(B - s0) with A and B the logarithms of the sums: written
    as above, the digits of small losses would cancel.
    """
    dtype, num_labels = compute_dtype(input), input.shape[1]
    y, observed = dense_target(target, num_labels, dtype, ignore_index)
    selected, bad_rows = dense_mask(mask, num_labels)
    if selected is not None:
        observed = selected if observed is None else observed & selected
    x = input.to(dtype)
    if bad_rows is not None:
        y = torch.where(bad_rows[:, None], math.nan, y)
    # `not y <= 0` rather than `y > 0`: NaN shall be seen by both sums.
    is_positive, is_negative = ~(y <= 0), ~(y >= 1)
    if observed is not None:
        x = torch.where(observed, x, 0.0)
        is_positive, is_negative = is_positive & observed, is_negative & observed
    s0 = threshold.to(dtype)
    never = torch.full_like(x, -math.inf)
    positive = torch.where(is_positive, -x + torch.where(is_positive, y, 1.0).log(), never)
    negative = torch.where(is_negative, x + torch.where(is_negative, 1 - y, 1.0).log(), never)
    loss = softplus(log_sum_exp(positive) + s0) + softplus(log_sum_exp(negative) - s0)
    return reduce_loss(loss, None, weight, reduction, normalizer)
