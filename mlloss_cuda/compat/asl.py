"""The Asymmetric Loss as its authors publish it: modules that return the sum.

Source: https://github.com/Alibaba-MIIL/ASL/blob/main/src/loss_functions/losses.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..targets import LabelsLike

__all__ = ["AsymmetricLoss", "AsymmetricLossOptimized"]


class AsymmetricLoss(torch.nn.Module):
    """ASL's ``AsymmetricLoss``, called ``loss(x, y)``: the sum over all elements.

    Args:
        gamma_neg: focusing exponent of negatives.
        gamma_pos: focusing exponent of positives.
        clip: probability that is taken off negatives; None is 0.
        eps: ignored. The original clamps its logs at log(eps), where its gradient ends: this is
            exact for logits of any size.
        disable_torch_grad_focal_loss: treat the focusing factor as a constant in the backward pass.

    >>> import torch
    >>> from mlloss_cuda.compat.asl import AsymmetricLoss
    >>> loss = AsymmetricLoss(gamma_neg=4, gamma_pos=1, clip=0.05)
    >>> loss(torch.zeros(1, 2), torch.tensor([[1., 0.]]))
    tensor(0.3711)
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float | None = 0.05,
        eps: float = 1e-8,
        disable_torch_grad_focal_loss: bool = True,
    ) -> None:
        super().__init__()
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.eps = eps
        self.disable_torch_grad_focal_loss = disable_torch_grad_focal_loss

    def forward(self, x: Tensor, y: LabelsLike, *, mask: LabelsLike | None = None) -> Tensor:
        """Return the sum of the losses of logits x ``[..., C]`` against labels y, 0-d."""
        return functional.asymmetric_loss(
            x,
            y,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip or 0.0,
            detach_focal=self.disable_torch_grad_focal_loss,
            mask=mask,
            reduction="sum",
        )


class AsymmetricLossOptimized(AsymmetricLoss):
    """ASL's ``AsymmetricLossOptimized``: the same loss; the focusing factor has a gradient.

    As in the original, only the default of ``disable_torch_grad_focal_loss`` differs from
    :class:`AsymmetricLoss`.
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float | None = 0.05,
        eps: float = 1e-8,
        disable_torch_grad_focal_loss: bool = False,
    ) -> None:
        super().__init__(gamma_neg, gamma_pos, clip, eps, disable_torch_grad_focal_loss)
