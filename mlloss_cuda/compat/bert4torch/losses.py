"""``bert4torch.losses``: modules that are called with y_pred first.

Source: https://github.com/Tongjilibo/bert4torch/blob/master/bert4torch/losses.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import functional
from ...targets import LabelsLike
from .._label_ids import loss_per_row

__all__ = ["MultilabelCategoricalCrossentropy", "SparseMultilabelCategoricalCrossentropy"]


class MultilabelCategoricalCrossentropy(torch.nn.Module):
    """bert4torch's ``MultilabelCategoricalCrossentropy``: the mean over rows.

    >>> import torch
    >>> from mlloss_cuda.compat.bert4torch.losses import MultilabelCategoricalCrossentropy
    >>> loss = MultilabelCategoricalCrossentropy()
    >>> loss(torch.zeros(2, 3), torch.tensor([[1, 0, 0], [0, 1, 1]]))
    tensor(1.7918)
    """

    def forward(
        self, y_pred: Tensor, y_true: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss of logits ``[..., C]`` against multi-hot or sparse labels, 0-d."""
        return functional.multilabel_categorical_crossentropy(y_pred, y_true, mask=mask)


class SparseMultilabelCategoricalCrossentropy(torch.nn.Module):
    """bert4torch's ``SparseMultilabelCategoricalCrossentropy``: one loss per row, no mean.

    Args:
        mask_zero: id 0 is padding, and label 0 takes no part in the loss.
        epsilon: ignored. The original clips the share of the negatives at it; this is exact.

    >>> import torch
    >>> from mlloss_cuda.compat.bert4torch.losses import SparseMultilabelCategoricalCrossentropy
    >>> loss = SparseMultilabelCategoricalCrossentropy(mask_zero=True)
    >>> loss(torch.zeros(2, 3), torch.tensor([[2, 0], [1, 2]]))
    tensor([1.3863, 1.0986])
    """

    def __init__(self, mask_zero: bool = False, epsilon: float = 1e-7) -> None:
        super().__init__()
        self.mask_zero = mask_zero
        self.epsilon = epsilon

    def forward(
        self, y_pred: Tensor, y_true: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss ``[...]`` of logits ``[..., C]`` against label ids ``[..., K]``."""
        return loss_per_row(y_pred, y_true, mask_zero=self.mask_zero, mask=mask)
