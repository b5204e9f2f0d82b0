"""The losses as functions: arguments are checked here; ops.py or reference.py computes."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from . import ops, reference
from .targets import (
    FLOATING_DTYPES,
    TARGET_DTYPES,
    Labels,
    SparseLabels,
    broadcast_to_input,
    check_strided,
    contents_may_be_checked,
    normalize_mask,
    normalize_target,
    rows_and_labels,
)

REDUCTIONS = ("none", "sum", "mean", "mean_nonzero", "weighted_mean", "batchmean")


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor | SparseLabels,
    *,
    mask: Tensor | SparseLabels | None = None,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Sigmoid cross-entropy (binary cross-entropy with logits), fused and masked.

    Per element, with logit x, target y and softplus(z) = log(1 + e^z):
    L = pos_weight y softplus(-x) + (1 - y) softplus(x), as in
    ``torch.nn.functional.binary_cross_entropy_with_logits``, but exact for confident negatives.
    A masked element contributes exactly 0 to value and gradient, whatever its logit and target are.

    Args:
        input: logits ``[..., C]``, fp32, bf16, fp16 or fp64. Rows may be strided.
        target: dense ``[..., C]`` of any bool, integer or floating dtype, with values in [0, 1]
            (floating ones may be soft), or :class:`SparseLabels` of as many rows as input has
            (a ``torch.sparse_csr`` tensor is converted). Values outside [0, 1] give NaN.
        mask: elements to use: bool or uint8 of a shape that broadcasts to ``[..., C]`` (nonzero =
            use), or :class:`SparseLabels` listing the observed labels of each row.
        weight: constant factor >= 0 per element, any shape that broadcasts to ``[..., C]``; it is
            read by strides, not expanded in memory (the one exception: shapes such as ``[B, 1, C]``
            for input of more than two dimensions).
        pos_weight: constant factor >= 0 of the positive term, broadcast in the same way.
        label_smoothing: e in [0, 1]; the target becomes y (1 - e) + e / 2.
        ignore_index: target value that means "missing", for dense targets: -1, -100, nan or any
            other number outside [0, 1]. Acts as a mask.
        reduction: with S = sum of mask * weight * L:
            ``'none'`` (mask * weight * L, shape of input), ``'sum'`` (S), ``'mean'`` (S / number of
            unmasked elements), ``'mean_nonzero'`` (S / number of elements whose mask * weight is
            not 0), ``'weighted_mean'`` (S / sum of mask * weight), ``'batchmean'`` (S / N, the
            number of rows). A zero denominator gives loss 0 and gradient 0.
        normalizer: number or 0-d tensor, a denominator instead of the one of ``reduction``
            (which must be left at ``'mean'`` or ``'sum'``).

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or the shape of input for ``'none'``. The
        gradient has the dtype of input, rounded once.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value. Negative weights and
            indices out of range are found on the CPU; on a GPU they give NaN in the elements or
            rows concerned (see :func:`mlloss_cuda.debug_checks`).

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[0.2, -1.0, 3.0], [0.0, 2.0, -2.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 2], [1]])
    >>> observed = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    >>> round(mlloss_cuda.sigmoid_cross_entropy(logits, labels, mask=observed).item(), 6)
    0.242769
    """
    _check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weights = _elementwise_constant(weight, input, "weight")
    pos_weights = _elementwise_constant(pos_weight, input, "pos_weight")
    label_smoothing = _number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    ignore_index = _ignored_value(ignore_index)
    normalizer = _normalizer(normalizer, reduction, input)
    logits = _logits(input)
    native = _is_native(logits, target_labels, mask_labels)
    loss = (ops if native else reference).sigmoid_cross_entropy(
        logits,
        target_labels,
        mask_labels,
        weights,
        pos_weights,
        normalizer,
        label_smoothing,
        ignore_index,
        reduction,
    )
    return loss.view(input.shape) if reduction == "none" else loss


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Tensor | SparseLabels,
    *,
    threshold: Tensor | float = 0.0,
    mask: Tensor | SparseLabels | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Multi-label categorical cross-entropy (ZLPR), one pass over each row.

    Per row, with logits x, positives P, negatives Q and threshold s0:
    L = log(e^-s0 + sum_P e^-x) + log(e^s0 + sum_Q e^x). It pushes positives above the threshold and
    negatives below; predict ``x > threshold``. Soft targets y count in both sums, with weights y
    and 1 - y. Source: Su et al., "ZLPR: A Novel Loss for Multi-label Classification" (2022),
    arXiv:2208.02955. Positives are excluded from the second sum, never subtracted.

    Args:
        input: logits ``[..., C]``, fp32, bf16, fp16 or fp64. Rows may be strided.
        target: as in :func:`sigmoid_cross_entropy`.
        threshold: s0, a number or a floating tensor of shape ``[]``, ``[...]`` or ``[..., 1]``;
            a tensor may require grad.
        mask: as in :func:`sigmoid_cross_entropy`; masked labels are in neither sum.
        weight: constant factor >= 0 per row: a number or shape ``[...]`` or ``[..., 1]``.
        ignore_index: as in :func:`sigmoid_cross_entropy`.
        reduction: over rows, with S = sum of weight * L: ``'none'`` (weight * L, shape ``[...]``),
            ``'sum'`` (S), ``'mean'`` and ``'batchmean'`` (S / number of rows), ``'mean_nonzero'``
            (S / number of nonzero weights), ``'weighted_mean'`` (S / sum of weights).
        normalizer: as in :func:`sigmoid_cross_entropy`.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[30.0, -5.0, -5.0, -5.0, -5.0, -5.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> round(mlloss_cuda.multilabel_categorical_crossentropy(logits, labels).item(), 6)
    0.033135
    """
    _check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weights = _rowwise_constant(weight, input, "weight")
    thresholds = _threshold(threshold, input)
    ignore_index = _ignored_value(ignore_index)
    normalizer = _normalizer(normalizer, reduction, input)
    logits = _logits(input)
    native = _is_native(logits, target_labels, mask_labels)
    loss = (ops if native else reference).multilabel_categorical_crossentropy(
        logits,
        target_labels,
        mask_labels,
        thresholds,
        weights,
        normalizer,
        ignore_index,
        reduction,
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


zlpr_loss = multilabel_categorical_crossentropy


def _is_native(logits: Tensor, target: Labels, mask: Labels | None) -> bool:
    """Whether native kernels serve; the reference, unlike them, relies on checked label ids."""
    native = ops.is_native(logits)
    if not native:
        ops.check_contents(target, mask, logits)
    return native


def _check_input(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor of logits, got {type(input).__name__}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"input must have one of the dtypes float32, bfloat16, float16, float64, "
            f"got {input.dtype}"
        )
    check_strided(input, "input")
    if input.dim() == 0:
        raise ValueError("input must have shape [..., C], got a 0-d tensor")


def _logits(input: Tensor) -> Tensor:
    """``[N, C]`` with unit stride within rows; copied only where strides leave no other way."""
    logits = rows_and_labels(input)
    return logits if logits.stride(1) == 1 or logits.shape[1] <= 1 else logits.contiguous()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number_between(value: float, name: str, low: float, high: float) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return float(value)


def _ignored_value(ignore_index: float | None) -> float | None:
    if ignore_index is None:
        return None
    if not _is_number(ignore_index):
        raise TypeError(f"ignore_index must be a number or None, got {type(ignore_index).__name__}")
    if 0 <= ignore_index <= 1:
        raise ValueError(
            "ignore_index must lie outside [0, 1] (such as -1, -100 or nan): values within are "
            f"targets, got {ignore_index}"
        )
    return float(ignore_index)


def _constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    """Check a weight and return it as a tensor on the device of `input`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if not _is_number(value):
            raise TypeError(
                f"{name} must be a tensor, a number or None, got {type(value).__name__}"
            )
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
        return torch.full(
            (), float(value), dtype=reference.compute_dtype(input), device=input.device
        )
    check_strided(value, name)
    if value.dtype not in TARGET_DTYPES:
        raise TypeError(f"{name} must be floating point, integer or bool, got {value.dtype}")
    if value.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad; it is a constant (detach it)")
    if contents_may_be_checked(value) and value.numel() > 0:
        smallest = value.amin()
        if bool(smallest < 0):
            raise ValueError(f"{name} must not be negative, got {smallest.item()}")
    return value


def _elementwise_constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    constant = _constant(value, input, name)
    return None if constant is None else broadcast_to_input(constant, input, name)


def _rowwise_constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    constant = _constant(value, input, name)
    return None if constant is None else _per_row(constant, input, name)


def _per_row(value: Tensor, input: Tensor, name: str) -> Tensor:
    """View ``[]``, ``[...]`` or ``[..., 1]`` as ``[N]``."""
    rows = input.shape[:-1]
    if value.dim() > 0 and value.shape != rows and value.shape != (*rows, 1):
        raise ValueError(
            f"{name} must have one value per row of input {list(input.shape)}: shape [], "
            f"{list(rows)} or {[*rows, 1]}, got {list(value.shape)}"
        )
    if value.dim() == 0:
        value = value.expand(rows)
    return value.reshape(-1)


def _threshold(threshold: Tensor | float, input: Tensor) -> Tensor:
    """Return the threshold as ``[N]`` in the dtype of the arithmetic."""
    dtype = reference.compute_dtype(input)
    if not isinstance(threshold, Tensor):
        if not _is_number(threshold):
            raise TypeError(
                f"threshold must be a number or a tensor, got {type(threshold).__name__}"
            )
        if not -math.inf < threshold < math.inf:
            raise ValueError(f"threshold must be finite, got {threshold}")
        threshold = torch.full((), float(threshold), dtype=dtype, device=input.device)
    check_strided(threshold, "threshold")
    if threshold.dtype not in FLOATING_DTYPES:
        raise TypeError(f"threshold must be floating point, got {threshold.dtype}")
    if threshold.device != input.device:
        raise ValueError(
            f"threshold must be on the device of input, {input.device}, got {threshold.device}"
        )
    return _per_row(threshold.to(dtype), input, "threshold")


def _normalizer(normalizer: Tensor | float | None, reduction: str, input: Tensor) -> Tensor | None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is None:
        return None
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"normalizer replaces the denominator of reduction='mean'; got reduction={reduction!r}"
        )
    if not isinstance(normalizer, Tensor):
        if not _is_number(normalizer):
            raise TypeError(
                "normalizer must be a number, a 0-d tensor or None, "
                f"got {type(normalizer).__name__}"
            )
        if not 0 <= normalizer < math.inf:
            raise ValueError(f"normalizer must be finite and not negative, got {normalizer}")
        return torch.full((), float(normalizer), dtype=torch.float64, device=input.device)
    check_strided(normalizer, "normalizer")
    if normalizer.dtype not in TARGET_DTYPES or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer must be floating point or integer, got {normalizer.dtype}")
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer must be 0-d, got shape {list(normalizer.shape)}")
    if normalizer.device != input.device:
        raise ValueError(
            f"normalizer must be on the device of input, {input.device}, got {normalizer.device}"
        )
    if normalizer.requires_grad:
        raise ValueError("normalizer must not require grad; it is a constant (detach it)")
    if contents_may_be_checked(normalizer) and not 0 <= normalizer.item() < math.inf:
        raise ValueError(f"normalizer must be finite and not negative, got {normalizer.item()}")
    return normalizer.to(torch.float64)
