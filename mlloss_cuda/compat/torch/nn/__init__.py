"""``torch.nn``: subclasses of torch's modules, so that constructor and buffers are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ....targets import LabelsLike
from . import functional

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "functional",
]


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """``torch.nn.BCEWithLogitsLoss``, exact for confident negatives, with masks.

    >>> import torch
    >>> from mlloss_cuda.compat.torch import nn
    >>> loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1., 3.]))
    >>> loss(torch.zeros(1, 2), torch.tensor([[0., 1.]]))
    tensor(1.3863)
    """

    def forward(
        self, input: Tensor, target: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss of logits ``[..., C]``."""
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            mask=mask,
        )


class BCELoss(torch.nn.BCELoss):
    """``torch.nn.BCELoss``, with masks.

    >>> import torch
    >>> from mlloss_cuda.compat.torch import nn
    >>> nn.BCELoss()(torch.tensor([[0.5, 0.25]]), torch.tensor([[0., 1.]]))
    tensor(1.0397)
    """

    def forward(
        self, input: Tensor, target: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss of probabilities ``[..., C]``."""
        return functional.binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, mask=mask
        )


class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    """``torch.nn.MultiLabelSoftMarginLoss``, exact for confident negatives, with masks.

    >>> import torch
    >>> from mlloss_cuda.compat.torch import nn
    >>> nn.MultiLabelSoftMarginLoss()(torch.zeros(1, 2), torch.tensor([[0., 1.]]))
    tensor(0.6931)
    """

    def forward(
        self, input: Tensor, target: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss of logits ``[..., C]``."""
        return functional.multilabel_soft_margin_loss(
            input, target, self.weight, reduction=self.reduction, mask=mask
        )


class MultiLabelMarginLoss(torch.nn.MultiLabelMarginLoss):
    """``torch.nn.MultiLabelMarginLoss``, in O(C log C) per row, with masks.

    >>> import torch
    >>> from mlloss_cuda.compat.torch import nn
    >>> x = torch.tensor([[0.1, 0.2, 0.4, 0.8]])
    >>> y = torch.tensor([[3, 0, -1, 1]])  # 3 and 0; what is behind -1 does not count
    >>> nn.MultiLabelMarginLoss()(x, y)
    tensor(0.8500)
    """

    def forward(
        self, input: Tensor, target: LabelsLike, *, mask: LabelsLike | None = None
    ) -> Tensor:
        """Return the loss of scores ``[..., C]``."""
        return functional.multilabel_margin_loss(input, target, reduction=self.reduction, mask=mask)
