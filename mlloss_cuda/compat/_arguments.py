"""What the shims share: types of arguments, and losses that average over labels first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..targets import LabelsLike, PackedLabels, SparseLabels

# A pointwise loss of this library with its constants bound: (input, target, **keywords).
ElementwiseLoss: TypeAlias = Callable[..., Tensor]


def as_tensor(value: object, name: str, device: torch.device | None = None) -> Tensor:
    """Return tensors as they are; make one of numbers, lists and NumPy arrays, as TensorFlow does.

    Raises:
        TypeError: there is no tensor of such a value.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or convertible to one: {error}") from error


def as_weight(value: object, name: str, device: torch.device) -> Tensor | float:
    """As :func:`as_tensor`, but a number stays one: moving it to a GPU would synchronise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return as_tensor(value, name, device)


def as_predictions(value: object, name: str) -> Tensor:
    """As :func:`as_tensor`; numbers that are not floating point become so."""
    tensor = as_tensor(value, name)
    if isinstance(value, Tensor) or tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_default_dtype())


def as_target(value: object, name: str, predictions: Tensor) -> LabelsLike:
    """As :func:`as_tensor`; labels in the formats of this library stay what they are."""
    if isinstance(value, (SparseLabels, PackedLabels)):
        return value
    return as_tensor(value, name, predictions.device)


def is_dense(target: LabelsLike) -> bool:
    """Whether `target` is an ordinary tensor, not one of the sparse formats."""
    return isinstance(target, Tensor) and target.layout == torch.strided and not target.is_nested


def reduce_row_means(
    loss: ElementwiseLoss,
    input: Tensor,
    target: LabelsLike,
    *,
    mask: LabelsLike | None,
    weight: Tensor | float | None,
    reduction: str,
) -> Tensor:
    """Average over the labels of each row, then reduce over rows.

    A masked label adds 0 to its row's average over all C labels, as a weight of 0 would; the mean
    is over what is not masked. For a mask that takes whole rows away, that is the mean over the
    rows that are left.

    Args:
        loss: gives the elements.
        input: logits or probabilities ``[..., C]``.
        target: labels of `input`.
        mask: elements to use.
        weight: factors that broadcast to ``[..., C]``.
        reduction: ``'none'`` (shape ``[...]``), ``'sum'`` or ``'mean'`` over rows.
    """
    if reduction == "none":
        return loss(input, target, mask=mask, weight=weight, reduction="none").mean(-1)
    if reduction == "sum":
        # The sum of averages over C labels, in one fused pass.
        normalizer = float(input.shape[-1])
        return loss(input, target, mask=mask, weight=weight, normalizer=normalizer)
    return loss(input, target, mask=mask, weight=weight, reduction=reduction)
