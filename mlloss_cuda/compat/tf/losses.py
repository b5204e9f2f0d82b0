"""``tf.losses`` of TensorFlow 1, which TensorFlow 2 calls ``tf.compat.v1.losses``.

TensorFlow 2's ``tf.losses`` is ``tf.keras.losses``; its two losses are here as well.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ... import functional
from ...targets import LabelsLike
from .._arguments import as_predictions, as_target, as_weight
from ..keras.losses import (
    BinaryCrossentropy,
    BinaryFocalCrossentropy,
    binary_crossentropy,
    binary_focal_crossentropy,
)

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "Reduction",
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "sigmoid_cross_entropy",
]


class Reduction:
    """The reductions of ``tf.losses``, by TensorFlow's names and values.

    With S, the sum of weight * loss: ``NONE`` (no reduction), ``SUM`` (S), ``MEAN`` (S / sum of
    weights), ``SUM_OVER_BATCH_SIZE`` (S / number of elements, that is, of losses),
    ``SUM_OVER_NONZERO_WEIGHTS`` and ``SUM_BY_NONZERO_WEIGHTS`` (S / number of weights that are not
    0). Weights count after broadcasting; a denominator of 0 gives 0.
    """

    NONE = "none"
    SUM = "weighted_sum"
    SUM_OVER_BATCH_SIZE = "weighted_sum_over_batch_size"
    SUM_OVER_NONZERO_WEIGHTS = "weighted_sum_by_nonzero_weights"
    SUM_BY_NONZERO_WEIGHTS = "weighted_sum_by_nonzero_weights"
    MEAN = "weighted_mean"

    _NATIVE: ClassVar[dict[str, str]] = {
        NONE: "none",
        SUM: "sum",
        SUM_OVER_BATCH_SIZE: "mean",
        SUM_BY_NONZERO_WEIGHTS: "mean_nonzero",
        MEAN: "weighted_mean",
    }

    @classmethod
    def all(cls) -> tuple[str, ...]:
        """Return all values."""
        return tuple(cls._NATIVE)

    @classmethod
    def validate(cls, key: str) -> None:
        """Raise ``ValueError`` if `key` is none of the values."""
        if key not in cls._NATIVE:
            raise ValueError(f"reduction must be one of {', '.join(cls.all())}, got {key!r}")


def sigmoid_cross_entropy(
    multi_class_labels: object,
    logits: object,
    weights: object = 1.0,
    label_smoothing: float = 0,
    scope: str | None = None,
    loss_collection: str | None = "losses",
    reduction: str = Reduction.SUM_BY_NONZERO_WEIGHTS,
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``tf.losses.sigmoid_cross_entropy``: :func:`mlloss_cuda.sigmoid_cross_entropy`, TF's way.

    Source: https://www.tensorflow.org/api_docs/python/tf/compat/v1/losses/sigmoid_cross_entropy

    Args:
        multi_class_labels: labels ``[..., C]``: a tensor, an array, a list, or any target of this
            library. Smoothed, they are labels * (1 - label_smoothing) + label_smoothing / 2.
        logits: ``[..., C]``.
        weights: a number, or a tensor of as many dimensions as logits whose sizes are 1 or those of
            logits, not negative. A weight of 0 leaves an element out, even if it is NaN.
        label_smoothing: in [0, 1].
        scope: ignored; it names nodes of a graph.
        loss_collection: ignored; it belongs to a graph.
        reduction: one of :class:`Reduction`.
        mask: elements to use; the others are as if they were not there, also in
            ``SUM_OVER_BATCH_SIZE``.

    Returns:
        The loss, 0-d, or ``[..., C]`` for ``Reduction.NONE``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.

    >>> import torch
    >>> import mlloss_cuda.compat.tf as tf
    >>> labels = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    >>> logits = torch.tensor([[.2, .2, .2, 0, .8], [0, .5, .5, .2, 0], [0, .5, .1, 0, .9],
    ...                        [.9, .9, .7, .1, 0]])
    >>> mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 1, 1, 1, 1]])
    >>> loss = tf.losses.sigmoid_cross_entropy(labels, logits, weights=mask)
    >>> round(loss.item(), 6)
    0.537532
    """
    del scope, loss_collection
    Reduction.validate(reduction)
    predictions = as_predictions(logits, "logits")
    weight = as_weight(weights, "weights", predictions.device)
    # TensorFlow does not align shapes from the right: [N] is no weight per label.
    if isinstance(weight, Tensor) and weight.dim() not in (0, predictions.dim()):
        raise ValueError(
            f"weights must have no dimension or as many as logits {list(predictions.shape)}, "
            f"got shape {list(weight.shape)}"
        )
    return functional.sigmoid_cross_entropy(
        predictions,
        as_target(multi_class_labels, "multi_class_labels", predictions),
        mask=mask,
        weight=None if isinstance(weight, float) and weight == 1 else weight,
        label_smoothing=label_smoothing,
        reduction=Reduction._NATIVE[reduction],
    )
