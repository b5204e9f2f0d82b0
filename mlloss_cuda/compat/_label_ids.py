"""ZLPR with label ids as target, as bert4keras and bert4torch define it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..targets import LabelsLike, PackedLabels, SparseLabels
from ._arguments import is_dense


def loss_per_row(
    y_pred: Tensor, y_true: LabelsLike, *, mask_zero: bool, mask: LabelsLike | None
) -> Tensor:
    """Return the loss ``[...]`` of logits ``[..., C]`` against label ids ``[..., K]``.

    Args:
        y_pred: logits.
        y_true: ids, negative ones being padding, or a sparse or packed target of this library.
        mask_zero: whether id 0 is padding and label 0 no label at all.
        mask: elements to use.
    """
    if isinstance(y_true, Tensor) and is_dense(y_true):
        if y_true.shape[:-1] != y_pred.shape[:-1]:
            raise ValueError(
                f"y_true must hold label ids [..., K], one row per row of y_pred "
                f"{list(y_pred.shape)}, got shape {list(y_true.shape)}"
            )
        y_true = SparseLabels.from_padded(y_true)
    if mask_zero:
        # In the originals column 0 is +inf among the positives and -inf among the negatives, so
        # that it adds nothing to either sum: it is masked.
        mask = _without_label_zero(mask, y_pred)
    return functional.multilabel_categorical_crossentropy(
        y_pred, y_true, mask=mask, reduction="none"
    )


def _without_label_zero(mask: LabelsLike | None, y_pred: Tensor) -> LabelsLike:
    if isinstance(mask, SparseLabels):
        return mask._replace(indices=mask.indices.masked_fill(mask.indices == 0, -1))
    if isinstance(mask, PackedLabels):
        words = mask.words.clone()
        words[..., :1] &= ~1
        return mask._replace(words=words)
    labels = torch.arange(y_pred.shape[-1], device=y_pred.device) != 0
    if mask is None:
        return labels
    if not is_dense(mask):
        raise ValueError("mask must be dense, SparseLabels or PackedLabels with mask_zero=True")
    return (mask != 0) & labels
