"""The losses as modules: constants in the constructor, data in ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .targets import SparseLabels


class _Loss(torch.nn.Module):
    """Keeps constants: tensors as non-persistent buffers, so that they follow ``.to(device)``."""

    def __init__(self, **constants: object) -> None:
        super().__init__()
        self._constant_names = tuple(constants)
        for name, value in constants.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _constants(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._constant_names}

    def extra_repr(self) -> str:
        """List the constants, tensors by their shape."""
        return ", ".join(
            f"{name}=tensor{list(value.shape)}"
            if isinstance(value, Tensor)
            else f"{name}={value!r}"
            for name, value in self._constants().items()
        )


class SigmoidCrossEntropyLoss(_Loss):
    """Module of :func:`mlloss_cuda.sigmoid_cross_entropy`; the arguments mean the same.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.SigmoidCrossEntropyLoss(reduction="sum")
    >>> round(loss(torch.zeros(2, 3), torch.ones(2, 3)).item(), 4)
    4.1589
    """

    def __init__(
        self,
        *,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor | SparseLabels,
        *,
        mask: Tensor | SparseLabels | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.sigmoid_cross_entropy(
            input, target, mask=mask, weight=weight, **self._constants()
        )


class MultilabelCategoricalCrossentropy(_Loss):
    """Module of :func:`mlloss_cuda.multilabel_categorical_crossentropy`.

    ``threshold`` may be a ``torch.nn.Parameter`` (shape ``[]``), which is then learned.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.MultilabelCategoricalCrossentropy()
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    1.7918
    """

    def __init__(
        self,
        *,
        threshold: Tensor | float = 0.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor | SparseLabels,
        *,
        mask: Tensor | SparseLabels | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.multilabel_categorical_crossentropy(
            input, target, mask=mask, weight=weight, **self._constants()
        )


ZLPRLoss = MultilabelCategoricalCrossentropy
