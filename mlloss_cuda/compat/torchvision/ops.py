"""``torchvision.ops``: the focal loss."""

from __future__ import annotations

from torch import Tensor

from ... import functional
from ...targets import LabelsLike

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: LabelsLike,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    mask: LabelsLike | None = None,
) -> Tensor:
    """``torchvision.ops.sigmoid_focal_loss``: :func:`mlloss_cuda.sigmoid_focal_loss`, unreduced.

    Source: https://docs.pytorch.org/vision/stable/generated/torchvision.ops.sigmoid_focal_loss.html

    Args:
        inputs: logits ``[..., C]``.
        targets: labels ``[..., C]``, or any target of this library.
        alpha: weight of positives, 1 - alpha that of negatives; negative: no such weights.
        gamma: focusing exponent >= 0.
        reduction: ``'none'`` (shape of inputs), ``'mean'`` or ``'sum'``, or another one of this
            library's.
        mask: elements to use.

    Raises:
        TypeError, ValueError: as in :func:`mlloss_cuda.sigmoid_focal_loss`.

    >>> import torch
    >>> from mlloss_cuda.compat import torchvision
    >>> torchvision.ops.sigmoid_focal_loss(torch.tensor([0., 2.]), torch.tensor([1., 1.]))
    tensor([0.0433, 0.0005])
    """
    return functional.sigmoid_focal_loss(
        inputs,
        targets,
        alpha=alpha if alpha >= 0 else None,
        gamma=gamma,
        mask=mask,
        reduction=reduction,
    )
