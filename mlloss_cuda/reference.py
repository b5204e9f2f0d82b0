"""The losses in plain PyTorch: specification, and fallback where nothing native serves.

The losses take the same checked arguments as those of ``ops.py``. They work in fp32 (fp64 for fp64
input) and build dense temporaries of shape ``[N, C]``; the native kernels compute the same numbers
without them.
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


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)), exact in both tails, with gradient sigmoid(x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log_sum_beside(own: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """Return log(e^own + sum of factor e^value) - own per row, exact also where it is close to 0.

    Args:
        own: ``[N]``. What is subtracted is a constant to autograd: it cancels in the loss.
        values: ``[N, C]``.
        factors: ``[N, C]``, constants in [0, 1]; 0 leaves a value out.
    """
    base = own.detach()
    values = torch.where(factors == 0, -math.inf, values - base[:, None])
    # Shifted by an exact maximum, so that gradients do not feel the rounding of the logarithm.
    largest = torch.cat([values.detach(), torch.zeros_like(base)[:, None]], dim=1).amax(dim=1)
    largest = torch.where(largest.isinf(), 0.0, largest)
    others = (factors * (values - largest[:, None]).exp()).sum(dim=1)
    # exp() - 1 is exact where it has to be, at largest = 0, and differentiates better than expm1.
    return largest + torch.log1p(others + ((own - base - largest).exp() - 1))


def reduce_loss(
    loss: Tensor,
    observed: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    """Weigh and reduce an unweighted `loss` that is finite where not `observed` or of weight 0.

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
        loss = weight * loss
    if reduction == "none":
        return loss
    # Sums in fp64, as the kernels do.
    total = loss.sum(dtype=torch.float64)
    if normalizer is not None:
        valid = (normalizer >= 0) & (normalizer < math.inf)
        denominator = torch.where(valid, normalizer.to(torch.float64), math.nan)
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
    mask: Labels | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    normalizer: Tensor | None,
    label_smoothing: float,
    ignore_index: float | None,
    reduction: str,
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
    used = observed
    if weight is not None:
        used = weight != 0 if used is None else used & (weight != 0)
    if used is not None:
        x = torch.where(used, x, 0.0)
        y = torch.where(used, y, 0.0)
    y = y * (1 - label_smoothing) + label_smoothing / 2
    positive = torch.where(y > 0, y * softplus(-x), y * 0)
    if pos_weight is not None:
        positive = positive * torch.where(pos_weight >= 0, pos_weight, math.nan).to(dtype)
    negative = torch.where(y < 1, (1 - y) * softplus(x), y * 0)
    loss = positive + negative
    if used is not None:
        loss = torch.where(used, loss, 0.0)
    return reduce_loss(loss, observed, weight, reduction, normalizer)


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    threshold: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: float | None,
    reduction: str,
) -> Tensor:
    """L = log(e^-s0 + sum y e^-x) + log(e^s0 + sum (1 - y) e^x), both sums over unmasked labels.

    Computed relative to -s0 and s0, which cancel: the digits of small losses are kept.
    """
    dtype, num_labels = compute_dtype(input), input.shape[1]
    y, observed = dense_target(target, num_labels, dtype, ignore_index)
    selected, bad_rows = dense_mask(mask, num_labels)
    if selected is not None:
        observed = selected if observed is None else observed & selected
    x = input.to(dtype)
    if bad_rows is not None:
        y = torch.where(bad_rows[:, None], math.nan, y)
    if weight is not None:
        x = torch.where(weight[:, None] == 0, 0.0, x)
        y = torch.where(weight[:, None] == 0, 0.0, y)
    positives, negatives = y, 1 - y
    if observed is not None:
        x = torch.where(observed, x, 0.0)
        positives = torch.where(observed, positives, 0.0)
        negatives = torch.where(observed, negatives, 0.0)
    loss = log_sum_beside(-threshold, -x, positives) + log_sum_beside(threshold, x, negatives)
    return reduce_loss(loss, None, weight, reduction, normalizer)
