"""``torch.nn.functional``: the multi-label losses, by torch's names and in its order.

Formulas: https://docs.pytorch.org/docs/stable/nn.functional.html#loss-functions
"""

from __future__ import annotations

from torch import Tensor

from .... import functional
from ....targets import LabelsLike, SparseLabels
from ..._arguments import is_dense, reduce_row_means

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
]


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction that torch's deprecated arguments stand for, if they are given."""
    if size_average is None and reduce is None:
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be one of none, mean, sum, got {reduction!r}")
        return reduction
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: LabelsLike,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``torch.nn.functional.binary_cross_entropy_with_logits``, exact for confident negatives.

    Args:
        input: logits ``[..., C]``.
        target: labels ``[..., C]`` in [0, 1], or any target of this library.
        weight: factors >= 0 that broadcast to ``[..., C]``.
        size_average: deprecated in torch, as there.
        reduce: deprecated in torch, as there.
        reduction: ``'none'``, ``'mean'`` (over all elements that are not masked, whatever the
            weights) or ``'sum'``.
        pos_weight: factors >= 0 of the positive term that broadcast to ``[..., C]``.
        mask: elements to use.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.
    """
    return functional.sigmoid_cross_entropy(
        input,
        target,
        mask=mask,
        weight=weight,
        pos_weight=pos_weight,
        reduction=_reduction(size_average, reduce, reduction),
    )


def binary_cross_entropy(
    input: Tensor,
    target: LabelsLike,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``torch.nn.functional.binary_cross_entropy``: input are probabilities, logs end at -100.

    Args:
        input: probabilities ``[..., C]``; outside [0, 1], where torch raises, NaN.
        target: as in :func:`binary_cross_entropy_with_logits`.
        weight: as in :func:`binary_cross_entropy_with_logits`.
        size_average: deprecated in torch, as there.
        reduce: deprecated in torch, as there.
        reduction: as in :func:`binary_cross_entropy_with_logits`.
        mask: elements to use.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.binary_cross_entropy`.
    """
    return functional.binary_cross_entropy(
        input,
        target,
        mask=mask,
        weight=weight,
        reduction=_reduction(size_average, reduce, reduction),
    )


def multilabel_soft_margin_loss(
    input: Tensor,
    target: LabelsLike,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``torch.nn.functional.multilabel_soft_margin_loss``: sigmoid cross-entropy, mean per row.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`binary_cross_entropy_with_logits`.
        weight: factors >= 0 that broadcast to ``[..., C]``.
        size_average: deprecated in torch, as there.
        reduce: deprecated in torch, as there.
        reduction: of the rows' means: ``'none'`` (shape ``[...]``), ``'mean'`` or ``'sum'``.
        mask: elements to use. ``'mean'`` divides by the number of these; ``'none'`` and ``'sum'``
            divide by C, as without a mask.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.
    """
    return reduce_row_means(
        functional.sigmoid_cross_entropy,
        input,
        target,
        mask=mask,
        weight=weight,
        reduction=_reduction(size_average, reduce, reduction),
    )


def multilabel_margin_loss(
    input: Tensor,
    target: LabelsLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``torch.nn.functional.multilabel_margin_loss``: hinge over pairs of labels, per row.

    Args:
        input: scores ``[..., C]``.
        target: label ids of the shape of input, ended by the first -1 of a row, or any sparse or
            packed target of this library. An id that occurs twice counts once.
        size_average: deprecated in torch, as there.
        reduce: deprecated in torch, as there.
        reduction: ``'none'`` (shape ``[...]``), ``'mean'`` over rows or ``'sum'``.
        mask: elements to use.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.multilabel_margin_loss`.
    """
    if isinstance(target, Tensor) and is_dense(target):
        if target.shape != input.shape:
            raise ValueError(
                f"target must hold label ids in the shape of input, {list(input.shape)}, "
                f"got {list(target.shape)}"
            )
        ended = (target < 0).cumsum(-1) > 0
        target = SparseLabels.from_padded(target.masked_fill(ended, -1))
    return functional.multilabel_margin_loss(
        input, target, mask=mask, reduction=_reduction(size_average, reduce, reduction)
    )
