"""``tf.nn``: sigmoid cross-entropy element by element."""

from __future__ import annotations

from torch import Tensor

from ... import functional
from ...targets import LabelsLike
from .._arguments import as_predictions, as_target, as_weight

__all__ = ["sigmoid_cross_entropy_with_logits", "weighted_cross_entropy_with_logits"]


def sigmoid_cross_entropy_with_logits(
    labels: object, logits: object, name: str | None = None, *, mask: LabelsLike | None = None
) -> Tensor:
    """``tf.nn.sigmoid_cross_entropy_with_logits``: labels first, no reduction.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn/sigmoid_cross_entropy_with_logits

    Args:
        labels: ``[..., C]``: a tensor, an array, a list, or any target of this library.
        logits: ``[..., C]``.
        name: ignored; it names a node of a graph.
        mask: elements to use; the others give 0.

    Returns:
        The elements' losses ``[..., C]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.

    >>> import mlloss_cuda.compat.tf as tf
    >>> tf.nn.sigmoid_cross_entropy_with_logits(labels=[1., 0.], logits=[0., 2.])
    tensor([0.6931, 2.1269])
    """
    del name
    predictions = as_predictions(logits, "logits")
    target = as_target(labels, "labels", predictions)
    return functional.sigmoid_cross_entropy(predictions, target, mask=mask, reduction="none")


def weighted_cross_entropy_with_logits(
    labels: object,
    logits: object,
    pos_weight: object,
    name: str | None = None,
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``tf.nn.weighted_cross_entropy_with_logits``: a factor for the positive term, no reduction.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn/weighted_cross_entropy_with_logits

    Args:
        labels: ``[..., C]``: a tensor, an array, a list, or any target of this library.
        logits: ``[..., C]``.
        pos_weight: factor >= 0 of the positive term; broadcasts to ``[..., C]``.
        name: ignored; it names a node of a graph.
        mask: elements to use; the others give 0.

    Returns:
        The elements' losses ``[..., C]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.

    >>> import mlloss_cuda.compat.tf as tf
    >>> tf.nn.weighted_cross_entropy_with_logits([1., 0.], [0., 2.], pos_weight=3.)
    tensor([2.0794, 2.1269])
    """
    del name
    predictions = as_predictions(logits, "logits")
    return functional.sigmoid_cross_entropy(
        predictions,
        as_target(labels, "labels", predictions),
        mask=mask,
        pos_weight=as_weight(pos_weight, "pos_weight", predictions.device),
        reduction="none",
    )
