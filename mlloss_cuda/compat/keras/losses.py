"""``keras.losses``: binary cross-entropy and its focal form, as functions and as classes.

Keras averages over the labels of a row before it weighs and reduces the rows. Source of formulas
and reductions: https://keras.io/api/losses/probabilistic_losses/ and
https://github.com/keras-team/keras/blob/master/keras/src/losses/loss.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...targets import LabelsLike
from .._arguments import (
    ElementwiseLoss,
    as_predictions,
    as_target,
    as_weight,
    is_dense,
    reduce_row_means,
)

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "Reduction",
    "binary_crossentropy",
    "binary_focal_crossentropy",
]

# keras.backend.epsilon(): probabilities are clipped to [1e-7, 1 - 1e-7].
_EPSILON = 1e-7

# Over rows: how Keras calls it, and the library.
_REDUCTIONS: dict[str | None, str] = {
    "sum_over_batch_size": "mean",
    "mean": "mean",
    "mean_with_sample_weight": "weighted_mean",
    "sum": "sum",
    "none": "none",
    None: "none",
}


class Reduction:
    """``tf.keras.losses.Reduction`` of Keras 2; Keras 3 has the strings only."""

    AUTO = "sum_over_batch_size"
    NONE = "none"
    SUM = "sum"
    SUM_OVER_BATCH_SIZE = "sum_over_batch_size"


def _cross_entropy(from_logits: bool, label_smoothing: float) -> ElementwiseLoss:
    if from_logits:
        return partial(functional.sigmoid_cross_entropy, label_smoothing=label_smoothing)
    return partial(functional.binary_cross_entropy, eps=_EPSILON, label_smoothing=label_smoothing)


def _logits(probabilities: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the clipped probabilities; NaN outside [0, 1].

    Gradients stop at what is clipped. A masked NaN must not spoil its gradient, hence two `where`.
    """
    if probabilities.dtype in (torch.float16, torch.bfloat16):
        probabilities = probabilities.float()  # 1 - 1e-7 needs the digits
    valid = (probabilities >= 0) & (probabilities <= 1)
    clipped = torch.where(valid, probabilities, 0.5).clamp(_EPSILON, 1 - _EPSILON)
    return torch.where(valid, clipped.logit(), torch.nan)


def _focal_loss_of_probabilities(input: Tensor, target: LabelsLike, /, **keywords: Any) -> Tensor:
    return functional.sigmoid_focal_loss(_logits(input), target, **keywords)


def _focal_cross_entropy(
    apply_class_balancing: bool,
    alpha: float,
    gamma: float,
    from_logits: bool,
    label_smoothing: float,
) -> ElementwiseLoss:
    return partial(
        functional.sigmoid_focal_loss if from_logits else _focal_loss_of_probabilities,
        alpha=alpha if apply_class_balancing else None,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )


def _labels_last(
    y_true: LabelsLike, y_pred: Tensor, mask: LabelsLike | None, axis: int
) -> tuple[LabelsLike, Tensor, LabelsLike | None]:
    """Move the axis of the labels to the end."""
    if y_pred.dim() == 0 or axis in (-1, y_pred.dim() - 1):
        return y_true, y_pred, mask
    if not -y_pred.dim() <= axis < y_pred.dim():
        raise ValueError(f"axis must be one of y_pred's {y_pred.dim()}, got {axis}")
    if isinstance(y_true, Tensor) and is_dense(y_true):
        y_true = y_true.movedim(axis, -1)
    else:
        raise ValueError(f"axis must be -1 where y_true is sparse or packed, got {axis}")
    if isinstance(mask, Tensor) and is_dense(mask):
        mask = mask.expand(y_pred.shape).movedim(axis, -1)
    elif mask is not None:
        raise ValueError(f"axis must be -1 where mask is sparse or packed, got {axis}")
    return y_true, y_pred.movedim(axis, -1), mask


def _same_rank(y_true: LabelsLike, y_pred: Tensor) -> tuple[LabelsLike, Tensor]:
    """Where the dimensions differ by a last one of size 1, add or drop it, as Keras does."""
    if not isinstance(y_true, Tensor) or not is_dense(y_true):
        return y_true, y_pred
    if y_true.dim() == y_pred.dim() + 1 and y_true.shape[-1] == 1:
        return (y_true, y_pred[..., None]) if y_pred.dim() == 1 else (y_true[..., 0], y_pred)
    if y_pred.dim() == y_true.dim() + 1 and y_pred.shape[-1] == 1:
        return (y_true[..., None], y_pred) if y_true.dim() == 1 else (y_true, y_pred[..., 0])
    return y_true, y_pred


def _row_weights(sample_weight: object, y_pred: Tensor) -> Tensor | float:
    """Return the sample weights in a shape that broadcasts to the rows, ``y_pred.shape[:-1]``."""
    weight = as_weight(sample_weight, "sample_weight", y_pred.device)
    if not isinstance(weight, Tensor):
        return weight
    rows = y_pred.shape[:-1]
    if weight.dim() == len(rows) + 1 and weight.shape[-1] == 1:
        weight = weight[..., 0]
    elif weight.dim() == len(rows) - 1 and rows[-1] == 1:
        weight = weight[..., None]
    aligned = zip(reversed(weight.shape), reversed(rows), strict=False)
    if weight.dim() > len(rows) or any(size not in (1, wanted) for size, wanted in aligned):
        raise ValueError(
            f"sample_weight must broadcast to y_pred's shape without labels, {list(rows)}, "
            f"got {list(weight.shape)}"
        )
    return weight


def _per_label(weight: Tensor | float | None) -> Tensor | float | None:
    """Let weights of rows ``[...]`` broadcast to ``[..., C]``."""
    return weight[..., None] if isinstance(weight, Tensor) else weight


def _row_means(
    loss: ElementwiseLoss, y_true: object, y_pred: object, axis: int, mask: LabelsLike | None
) -> Tensor:
    predictions = as_predictions(y_pred, "y_pred")
    target = as_target(y_true, "y_true", predictions)
    target, predictions, mask = _labels_last(target, predictions, mask, axis)
    return reduce_row_means(loss, predictions, target, mask=mask, weight=None, reduction="none")


def binary_crossentropy(
    y_true: object,
    y_pred: object,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``keras.losses.binary_crossentropy``: the mean over the labels of each row.

    Args:
        y_true: labels ``[..., C]``: a tensor, an array, a list, or any target of this library.
        y_pred: probabilities ``[..., C]``, clipped to [1e-7, 1 - 1e-7] (NaN outside [0, 1]), or
            logits.
        from_logits: whether y_pred are logits, which is faster and exact.
        label_smoothing: e in [0, 1]; the labels become y (1 - e) + e / 2.
        axis: where the labels are; -1 if y_true or mask are not dense.
        mask: elements to use. The others add 0 to their row's mean over C.

    Returns:
        One loss per row, shape ``[...]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.

    >>> from mlloss_cuda.compat import keras
    >>> keras.losses.binary_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]])
    tensor([0.9163, 0.7136])
    """
    return _row_means(_cross_entropy(from_logits, label_smoothing), y_true, y_pred, axis, mask)


def binary_focal_crossentropy(
    y_true: object,
    y_pred: object,
    apply_class_balancing: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``keras.losses.binary_focal_crossentropy``: the mean over the labels of each row.

    Args:
        y_true: as in :func:`binary_crossentropy`.
        y_pred: as in :func:`binary_crossentropy`. Keras clips the probabilities also of logits;
            here logits are exact.
        apply_class_balancing: whether positives weigh alpha and negatives 1 - alpha.
        alpha: in [0, 1].
        gamma: focusing exponent >= 0.
        from_logits: as in :func:`binary_crossentropy`.
        label_smoothing: as in :func:`binary_crossentropy`.
        axis: as in :func:`binary_crossentropy`.
        mask: as in :func:`binary_crossentropy`.

    Returns:
        One loss per row, shape ``[...]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_focal_loss`.

    >>> from mlloss_cuda.compat import keras
    >>> keras.losses.binary_focal_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]], gamma=2)
    tensor([0.3299, 0.2058])
    """
    loss = _focal_cross_entropy(apply_class_balancing, alpha, gamma, from_logits, label_smoothing)
    return _row_means(loss, y_true, y_pred, axis, mask)


class _Loss(torch.nn.Module):
    """Weighs and reduces the rows' means; also a torch module."""

    def __init__(
        self,
        loss: ElementwiseLoss,
        axis: int,
        reduction: str | None,
        name: str,
        dtype: torch.dtype | str | None,
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            names = ", ".join(repr(key) for key in _REDUCTIONS)
            raise ValueError(f"reduction must be one of {names}, got {reduction!r}")
        self.loss = loss
        self.axis = axis
        self.reduction = reduction
        self.name = name
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def forward(
        self,
        y_true: object,
        y_pred: object,
        sample_weight: object = None,
        *,
        mask: LabelsLike | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            y_true: labels ``[..., C]``, or ``[...]`` where C is 1.
            y_pred: predictions ``[..., C]``.
            sample_weight: factors >= 0 of the rows, ``[...]`` or ``[..., 1]``, or a number.
            mask: elements to use. The means divide by the number of these; ``'sum'`` and ``'none'``
                divide by C, as without a mask.
        """
        predictions = as_predictions(y_pred, "y_pred")
        if self.dtype is not None:
            predictions = predictions.to(self.dtype)
        target = as_target(y_true, "y_true", predictions)
        target, predictions = _same_rank(target, predictions)
        target, predictions, mask = _labels_last(target, predictions, mask, self.axis)
        reduction = _REDUCTIONS[self.reduction]
        if predictions.dim() == 1 and reduction == "weighted_mean":
            reduction = "mean"  # Keras does not reduce a single row
        weight = None
        if sample_weight is not None:
            weight = _row_weights(sample_weight, predictions)
            if reduction == "weighted_mean" and mask is None:
                # Keras divides by the sum of the weights as they were given, not broadcast.
                total = weight.sum(dtype=torch.float64) if isinstance(weight, Tensor) else weight
                return self.loss(
                    predictions,
                    target,
                    weight=_per_label(weight),
                    normalizer=total * predictions.shape[-1],
                )
        return reduce_row_means(
            self.loss,
            predictions,
            target,
            mask=mask,
            weight=_per_label(weight),
            reduction=reduction,
        )


class BinaryCrossentropy(_Loss):
    """``keras.losses.BinaryCrossentropy``, called ``loss(y_true, y_pred, sample_weight=None)``.

    Args:
        from_logits: as in :func:`binary_crossentropy`.
        label_smoothing: as in :func:`binary_crossentropy`.
        axis: as in :func:`binary_crossentropy`.
        reduction: of the rows' means, weighted: ``'sum_over_batch_size'`` or ``'mean'`` (their
            mean, whatever the weights), ``'mean_with_sample_weight'`` (sum / sum of the sample
            weights), ``'sum'``, ``'none'`` or None (shape ``[...]``).
        name: kept as an attribute.
        dtype: y_pred is converted to it; by default it stays what it is.

    >>> from mlloss_cuda.compat import keras
    >>> bce = keras.losses.BinaryCrossentropy(from_logits=True)
    >>> y_true, y_pred = [[0, 1], [0, 0]], [[-18.6, 0.51], [2.94, -12.8]]
    >>> bce(y_true, y_pred), bce(y_true, y_pred, sample_weight=[0.8, 0.2])
    (tensor(0.8655), tensor(0.2436))
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_crossentropy",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        loss = _cross_entropy(from_logits, label_smoothing)
        super().__init__(loss, axis, reduction, name, dtype)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing


class BinaryFocalCrossentropy(_Loss):
    """``keras.losses.BinaryFocalCrossentropy``, called as :class:`BinaryCrossentropy`.

    Args:
        apply_class_balancing: as in :func:`binary_focal_crossentropy`.
        alpha: as in :func:`binary_focal_crossentropy`.
        gamma: as in :func:`binary_focal_crossentropy`.
        from_logits: as in :func:`binary_crossentropy`.
        label_smoothing: as in :func:`binary_crossentropy`.
        axis: as in :func:`binary_crossentropy`.
        reduction: as in :class:`BinaryCrossentropy`.
        name: as in :class:`BinaryCrossentropy`.
        dtype: as in :class:`BinaryCrossentropy`.

    >>> from mlloss_cuda.compat import keras
    >>> loss = keras.losses.BinaryFocalCrossentropy(gamma=2, from_logits=True)
    >>> round(loss([0, 1, 0, 0], [-18.6, 0.51, 2.94, -12.8]).item(), 3)
    0.691
    """

    def __init__(
        self,
        apply_class_balancing: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_focal_crossentropy",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        loss = _focal_cross_entropy(
            apply_class_balancing, alpha, gamma, from_logits, label_smoothing
        )
        super().__init__(loss, axis, reduction, name, dtype)
        self.apply_class_balancing = apply_class_balancing
        self.alpha = alpha
        self.gamma = gamma
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
