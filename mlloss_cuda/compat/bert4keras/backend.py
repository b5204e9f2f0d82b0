"""``bert4keras.backend``: y_true first, one loss per row.

Source: https://github.com/bojone/bert4keras/blob/master/bert4keras/backend.py
"""

from __future__ import annotations

from torch import Tensor

from ... import functional
from ...targets import LabelsLike
from .._arguments import is_dense
from .._label_ids import loss_per_row

__all__ = ["multilabel_categorical_crossentropy", "sparse_multilabel_categorical_crossentropy"]


def multilabel_categorical_crossentropy(
    y_true: LabelsLike, y_pred: Tensor, *, mask: LabelsLike | None = None
) -> Tensor:
    """bert4keras's ``multilabel_categorical_crossentropy``, exact for logits of any size.

    Args:
        y_true: multi-hot labels ``[..., C]``, or any target of this library.
        y_pred: logits ``[..., C]``.
        mask: elements to use; masked labels are in neither sum.

    Returns:
        One loss per row, shape ``[...]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.multilabel_categorical_crossentropy`.

    >>> import torch
    >>> from mlloss_cuda.compat.bert4keras.backend import multilabel_categorical_crossentropy
    >>> y_true = torch.tensor([[1, 0, 0], [0, 1, 1]])
    >>> multilabel_categorical_crossentropy(y_true, torch.zeros(2, 3))
    tensor([1.7918, 1.7918])
    """
    return functional.multilabel_categorical_crossentropy(
        y_pred, y_true, mask=mask, reduction="none"
    )


def sparse_multilabel_categorical_crossentropy(
    y_true: LabelsLike, y_pred: Tensor, mask_zero: bool = False, *, mask: LabelsLike | None = None
) -> Tensor:
    """bert4keras's ``sparse_multilabel_categorical_crossentropy``: labels given as ids.

    The original finds the negatives' sum by subtraction and clips it at 1e-7; here nothing is
    subtracted. A row is a set: an id that occurs twice counts once.

    Args:
        y_true: label ids ``[..., K]`` (floating ones are converted), or any sparse target of this
            library. Negative ids are padding.
        y_pred: logits ``[..., C]``.
        mask_zero: id 0 is padding too, and label 0 takes no part in the loss.
        mask: elements to use; masked labels are in neither sum.

    Returns:
        One loss per row, shape ``[...]``.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.multilabel_categorical_crossentropy`.

    >>> import torch
    >>> from mlloss_cuda.compat.bert4keras.backend import (
    ...     sparse_multilabel_categorical_crossentropy,
    ... )
    >>> ids = torch.tensor([[2, 0], [1, 2]])
    >>> sparse_multilabel_categorical_crossentropy(ids, torch.zeros(2, 3), mask_zero=True)
    tensor([1.3863, 1.0986])
    """
    if isinstance(y_true, Tensor) and is_dense(y_true) and y_true.is_floating_point():
        y_true = y_true.long()  # Keras feeds targets as floats
    return loss_per_row(y_pred, y_true, mask_zero=mask_zero, mask=mask)
