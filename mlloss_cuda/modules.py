"""The losses as modules: constants in the constructor, data in ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import functional
from .ranks import GroupAttribute
from .sharding import Group
from .targets import LabelsLike


class _Loss(torch.nn.Module):
    """Keeps constants: tensors as non-persistent buffers, so that they follow ``.to(device)``.

    They keep their dtype: a model in half precision still has a normalizer of 1001 samples.
    """

    process_group = GroupAttribute()

    def __init__(self, **constants: object) -> None:
        super().__init__()
        self._constant_names = tuple(constants)
        for name, value in constants.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Loss:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

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
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.sigmoid_cross_entropy(
            input, target, mask=mask, weight=weight, **self._constants()
        )


class BinaryCrossEntropyLoss(_Loss):
    """Module of :func:`mlloss_cuda.binary_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.BinaryCrossEntropyLoss(eps=1e-7)
    >>> round(loss(torch.full((2, 3), 0.25), torch.ones(2, 3)).item(), 4)
    1.3863
    """

    def __init__(
        self,
        *,
        eps: float | None = None,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            eps=eps,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        probs: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of probabilities ``probs`` ``[..., C]`` against ``target``."""
        return functional.binary_cross_entropy(
            probs, target, mask=mask, weight=weight, **self._constants()
        )


class SigmoidFocalLoss(_Loss):
    """Module of :func:`mlloss_cuda.sigmoid_focal_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.SigmoidFocalLoss(gamma=1.0)
    >>> round(loss(torch.zeros(2, 3), torch.ones(2, 3)).item(), 4)
    0.0866
    """

    def __init__(
        self,
        *,
        alpha: Tensor | float | None = 0.25,
        gamma: Tensor | float = 2.0,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.sigmoid_focal_loss(
            input, target, mask=mask, weight=weight, **self._constants()
        )


class AsymmetricLoss(_Loss):
    """Module of :func:`mlloss_cuda.asymmetric_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.AsymmetricLoss(reduction="sum")
    >>> round(loss(torch.zeros(2, 3), torch.ones(2, 3)).item(), 4)
    2.0794
    """

    def __init__(
        self,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        detach_focal: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            clip=clip,
            detach_focal=detach_focal,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.asymmetric_loss(
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
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            threshold=threshold,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.multilabel_categorical_crossentropy(
            input, target, mask=mask, weight=weight, **self._constants()
        )


ZLPRLoss = MultilabelCategoricalCrossentropy


class MultilabelRankingLoss(_Loss):
    """Module of :func:`mlloss_cuda.multilabel_ranking_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.MultilabelRankingLoss()
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    1.0986
    """

    def __init__(
        self,
        *,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
        inplace_backward: bool = False,
        grad_scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.multilabel_ranking_loss(
            input, target, mask=mask, weight=weight, **self._constants()
        )


LSEPLoss = MultilabelRankingLoss


class MultilabelSoftmaxCrossEntropy(_Loss):
    """Module of :func:`mlloss_cuda.multilabel_softmax_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.MultilabelSoftmaxCrossEntropy()
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    1.0986
    """

    def __init__(
        self,
        *,
        normalize_target: bool = True,
        partition: str | None = None,
        partition_weight: float = 1.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            normalize_target=normalize_target,
            partition=partition,
            partition_weight=partition_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.multilabel_softmax_cross_entropy(
            input, target, mask=mask, weight=weight, **self._constants()
        )


class MultilabelMarginLoss(_Loss):
    """Module of :func:`mlloss_cuda.multilabel_margin_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.MultilabelMarginLoss()
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    0.6667
    """

    def __init__(
        self,
        *,
        margin: float = 1.0,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            margin=margin,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.multilabel_margin_loss(
            input, target, mask=mask, weight=weight, **self._constants()
        )


class TverskyLoss(_Loss):
    """Module of :func:`mlloss_cuda.tversky_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.TverskyLoss(alpha=0.3, beta=0.7)
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    0.5652
    """

    def __init__(
        self,
        *,
        from_logits: bool = True,
        axis: str = "samples",
        smooth: float = 1e-5,
        alpha: float = 0.5,
        beta: float = 0.5,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            from_logits=from_logits,
            axis=axis,
            smooth=smooth,
            alpha=alpha,
            beta=beta,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.tversky_loss(input, target, mask=mask, weight=weight, **self._constants())


class DiceLoss(_Loss):
    """Module of :func:`mlloss_cuda.dice_loss`.

    >>> import torch, mlloss_cuda
    >>> loss = mlloss_cuda.DiceLoss(axis="micro")
    >>> round(loss(torch.zeros(2, 3), torch.eye(3)[:2]).item(), 4)
    0.6
    """

    def __init__(
        self,
        *,
        from_logits: bool = True,
        axis: str = "samples",
        smooth: float = 1e-5,
        ignore_index: float | None = None,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            from_logits=from_logits,
            axis=axis,
            smooth=smooth,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
        )

    def forward(
        self,
        input: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        weight: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input`` ``[..., C]`` against ``target``."""
        return functional.dice_loss(input, target, mask=mask, weight=weight, **self._constants())
