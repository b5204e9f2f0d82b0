"""The losses as functions: what people call. ``arguments.py`` and ``targets.py`` check."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import arguments, inplace, ops, plain, reference, targets
from .inplace import Overwriting
from .plain import is_one, is_zero
from .ranks import Ranks
from .sharding import Group, is_spread, over_shards, ranks_of
from .targets import Labels, LabelsLike, normalize_mask, normalize_target


def sigmoid_cross_entropy(
    input: Tensor,
    target: LabelsLike,
    *,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Sigmoid cross-entropy (binary cross-entropy with logits), fused and masked.

    Per element, with logit x, target y and softplus(z) = log(1 + e^z):
    L = pos_weight y softplus(-x) + (1 - y) softplus(x), as in
    ``torch.nn.functional.binary_cross_entropy_with_logits``, but exact for confident negatives.
    A masked element contributes exactly 0 to value and gradient, whatever its logit and target are.

    Args:
        input: logits ``[..., C]``, fp32, bf16, fp16 or fp64. Rows may be strided.
        target: one of

            - dense ``[..., C]`` of any bool, integer or floating dtype, with values in [0, 1]
              (floating ones may be soft); values outside give NaN
            - :class:`SparseLabels` of as many rows as input has; with ``observed_only``, labels
              that are not listed are missing
            - :class:`PackedLabels`
            - a ``torch.sparse_csr`` tensor ``[N, C]`` (its values are the targets), or a nested
              tensor ``[N, *]`` of layout ``torch.jagged`` (label ids)
        mask: elements to use: bool or uint8 of a shape that broadcasts to ``[..., C]`` (nonzero =
            use), :class:`SparseLabels` listing the observed labels of each row, or any of the
            other formats of ``target``.
        weight: constant factor >= 0 per element, any shape that broadcasts to ``[..., C]``; it is
            read by strides, not expanded in memory (the one exception: shapes such as ``[B, 1, C]``
            for input of more than two dimensions).
        pos_weight: constant factor >= 0 of the positive term, broadcast in the same way.
        label_smoothing: e in [0, 1]; the target becomes y (1 - e) + e / 2.
        ignore_index: target value that means "missing", for dense targets: -1, -100, nan or any
            other number outside [0, 1]. Acts as a mask.
        reduction: with S = sum of mask * weight * L:
            ``'none'`` (mask * weight * L, shape of input), ``'sum'`` (S), ``'mean'`` (S / number of
            unmasked elements), ``'mean_nonzero'`` (S / number of elements whose mask * weight is
            not 0), ``'weighted_mean'`` (S / sum of mask * weight), ``'batchmean'`` (S / N, the
            number of rows). A zero denominator gives loss 0 and gradient 0.
        normalizer: number or 0-d tensor, a denominator instead of the one of ``reduction``
            (which must be left at ``'mean'`` or ``'sum'``).
        process_group: where labels are spread over ranks of ``torch.distributed``, and input has
            those of this rank, of the same rows as on the others: the ``ProcessGroup``, or a
            :class:`LabelShard`. The loss is that of all labels, on every rank, and the gradient
            this rank's part of it. Sparse targets and masks hold ids of all labels, everything
            else has the columns of input. A ``DTensor`` knows its ranks: leave this at None.
        inplace_backward: whether the forward pass shall compute the gradient as well and write it
            over ``input``, which saves the memory of a gradient and one reading of everything. For
            logits that nobody needs afterwards: they must be computed (no leaf), viewable as
            ``[N, C]`` with unit stride within rows, and ``reduction`` not ``'none'``. There is one
            backward pass then. Without effect where no gradient is wanted, and under
            ``torch.compile``.
        grad_scale: with ``inplace_backward``, the gradient of the loss that is to be expected from
            above: a positive number or 0-d tensor, such as a loss scale or 1 / accumulation steps.
            What comes is then not multiplied again, and low precision is rounded once.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or the shape of input for ``'none'``. The
        gradient has the dtype of input, rounded once.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value, or input cannot be overwritten.
            Negative weights and indices out of range are found on the CPU; on a GPU they give NaN
            in the elements or rows concerned (see :func:`mlloss_cuda.debug_checks`).
        RuntimeError: from the backward pass with ``inplace_backward``: the logits were used again
            after the loss, their old values are needed, or it runs a second time.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[0.2, -1.0, 3.0], [0.0, 2.0, -2.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 2], [1]])
    >>> observed = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    >>> round(mlloss_cuda.sigmoid_cross_entropy(logits, labels, mask=observed).item(), 6)
    0.242769

    The same with the gradient over the logits, which are not needed again:

    >>> model = torch.nn.Linear(4, 3)
    >>> logits = model(torch.ones(2, 4))
    >>> loss = mlloss_cuda.sigmoid_cross_entropy(logits, labels, inplace_backward=True)
    >>> loss.backward()
    """
    if (
        inplace_backward is False
        and is_one(grad_scale)
        and mask is weight is pos_weight is ignore_index is normalizer is process_group is None
        and is_zero(label_smoothing)
    ):
        short = plain.sigmoid_cross_entropy(input, target, reduction)
        if short is not None:
            return short
    if is_spread(input, process_group):
        return over_shards(
            *(sigmoid_cross_entropy, input, target, process_group),
            mask=mask,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.elementwise_constant(weight, input, "weight")
    pos_weight = arguments.elementwise_constant(pos_weight, input, "pos_weight")
    label_smoothing = arguments.number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, input)
    logits = arguments.as_rows(input)
    native = _is_native(logits, target_labels, mask_labels, ignore_index)
    loss = _backend(native, overwriting, ranks_of(process_group)).sigmoid_cross_entropy(
        logits,
        target_labels,
        mask_labels,
        weight=weight,
        pos_weight=pos_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(input.shape) if reduction == "none" else loss


def binary_cross_entropy(  # noqa: D417 (documented once, where the docstring says)
    probs: Tensor,
    target: LabelsLike,
    *,
    eps: float | None = None,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Binary cross-entropy of probabilities; from logits, take :func:`sigmoid_cross_entropy`.

    Per element, with probability p: L = -pos_weight y log p - (1 - y) log(1 - p).

    Args:
        probs: probabilities ``[..., C]``. Those outside [0, 1] give NaN, or with
            :func:`mlloss_cuda.debug_checks` an error.
        target: as in :func:`sigmoid_cross_entropy`, like all arguments that are not listed.
        eps: None: each logarithm is at least -100 and its gradient at most 1e12, as in
            ``torch.nn.functional.binary_cross_entropy``. A number between 0 and 0.5: p is clipped
            to [eps, 1 - eps], beyond which the gradient is 0, as in Keras (eps=1e-7).
        inplace_backward: not for what ``torch.sigmoid`` returns, which its own backward pass needs.

    Returns:
        The loss, as :func:`sigmoid_cross_entropy` does.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> probs = torch.tensor([[0.9, 0.2, 1.0]])
    >>> target = torch.tensor([[1.0, 0.0, 0.0]])
    >>> round(mlloss_cuda.binary_cross_entropy(probs, target).item(), 4)
    33.4428
    >>> round(mlloss_cuda.binary_cross_entropy(probs, target, eps=1e-7).item(), 5)
    5.4822
    """
    if (
        inplace_backward is False
        and is_one(grad_scale)
        and (
            mask
            is weight
            is pos_weight
            is eps
            is ignore_index
            is normalizer
            is process_group
            is None
        )
        and is_zero(label_smoothing)
    ):
        short = plain.binary_cross_entropy(probs, target, reduction, 0.0)
        if short is not None:
            return short
    if is_spread(probs, process_group):
        return over_shards(
            *(binary_cross_entropy, probs, target, process_group),
            eps=eps,
            mask=mask,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(probs, "probs", "probabilities")
    target_labels = normalize_target(target, probs, ignore_index)
    mask_labels = normalize_mask(mask, probs)
    weight = arguments.elementwise_constant(weight, probs, "weight")
    pos_weight = arguments.elementwise_constant(pos_weight, probs, "pos_weight")
    eps = arguments.clipping(eps)
    label_smoothing = arguments.number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, probs)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, probs, "probs")
    rows = arguments.as_rows(probs)
    native = _is_native(rows, target_labels, mask_labels, ignore_index)
    arguments.check_probabilities(rows, target_labels, mask_labels, ignore_index, "probs")
    loss = _backend(native, overwriting, ranks_of(process_group)).binary_cross_entropy(
        rows,
        target_labels,
        mask_labels,
        weight=weight,
        pos_weight=pos_weight,
        eps=eps,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(probs.shape) if reduction == "none" else loss


def sigmoid_focal_loss(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    alpha: Tensor | float | None = 0.25,
    gamma: Tensor | float = 2.0,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Focal loss: sigmoid cross-entropy, less of it where a label is predicted well.

    Per element, with p = sigmoid(x), q = 1 - p and CE the loss of :func:`sigmoid_cross_entropy`:
    L = (alpha y + (1 - alpha) (1 - y)) (y q + (1 - y) p)^gamma CE. For y = 1 this is
    alpha q^gamma softplus(-x), for y = 0 it is (1 - alpha) p^gamma softplus(x). Source: Lin et al.,
    "Focal Loss for Dense Object Detection" (2017), arXiv:1708.02002; soft targets as in
    torchvision.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`sigmoid_cross_entropy`, like all arguments that are not listed.
        alpha: share of the positives in [0, 1]: a number, a constant tensor that broadcasts to
            ``[..., C]`` (such as ``[C]``), or None for no balancing.
        gamma: exponent >= 0: a number or a constant tensor that broadcasts in the same way. 0 gives
            the balanced cross-entropy.
        pos_weight: constant factor >= 0 of the positive term of CE.

    Returns:
        The loss, as :func:`sigmoid_cross_entropy` does.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, -1.0, 0.5]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> round(mlloss_cuda.sigmoid_focal_loss(logits, labels, reduction="sum").item(), 6)
    0.300503
    """
    if (
        mask is weight is pos_weight is ignore_index is normalizer is process_group is None
        and is_zero(label_smoothing)
        and inplace_backward is False
        and is_one(grad_scale)
        and type(alpha) is type(gamma) is float
        and 0 <= alpha <= 1
        and 0 <= gamma < math.inf
    ):
        short = plain.sigmoid_focal_loss(input, target, reduction, alpha, 1.0 - alpha, gamma)
        if short is not None:
            return short
    if is_spread(input, process_group):
        return over_shards(
            *(sigmoid_focal_loss, input, target, process_group),
            alpha=alpha,
            gamma=gamma,
            mask=mask,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.elementwise_constant(weight, input, "weight")
    pos_weight = arguments.elementwise_constant(pos_weight, input, "pos_weight")
    alpha = arguments.focal_alpha(alpha, input)
    gamma = arguments.focal_gamma(gamma, input)
    label_smoothing = arguments.number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, input)
    logits = arguments.as_rows(input)
    native = _is_native(logits, target_labels, mask_labels, ignore_index)
    loss = _backend(native, overwriting, ranks_of(process_group)).sigmoid_focal_loss(
        logits,
        target_labels,
        mask_labels,
        weight=weight,
        pos_weight=pos_weight,
        alpha=alpha,
        gamma=gamma,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(input.shape) if reduction == "none" else loss


def asymmetric_loss(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_focal: bool = False,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Asymmetric loss (ASL): focusing of its own for negatives, of which the easy ones count 0.

    Per element, with p = sigmoid(x), q = 1 - p and pm = max(p - clip, 0):
    L = y q^gamma_pos softplus(-x) - (1 - y) pm^gamma_neg log(1 - pm). Source: Ridnik et al.,
    "Asymmetric Loss For Multi-Label Classification" (2020), arXiv:2009.14119. Note the reduction:
    the published code returns the sum.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`sigmoid_cross_entropy`, like all arguments that are not listed.
        gamma_neg: exponent >= 0 of the negatives.
        gamma_pos: exponent >= 0 of the positives.
        clip: probability in [0, 1) by which negatives are shifted.
        detach_focal: whether the factors q^gamma_pos and pm^gamma_neg are constants in the backward
            pass (``disable_torch_grad_focal_loss`` in the published code). The gradient is then not
            the derivative of the loss.

    Returns:
        The loss, as :func:`sigmoid_cross_entropy` does.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, -4.0, 0.5]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> mlloss_cuda.asymmetric_loss(logits, labels, reduction="none")
    tensor([[0.0151, 0.0000, 0.0913]])
    """
    if (
        mask is weight is ignore_index is normalizer is process_group is None
        and is_zero(label_smoothing)
        and inplace_backward is False
        and is_one(grad_scale)
        and type(gamma_neg) is type(gamma_pos) is type(clip) is float
        and 0 <= gamma_neg < math.inf
        and 0 <= gamma_pos < math.inf
        and 0 <= clip < 1
        and detach_focal is False
    ):
        short = plain.asymmetric_loss(input, target, reduction, gamma_neg, gamma_pos, clip, 0.0)
        if short is not None:
            return short
    if is_spread(input, process_group):
        return over_shards(
            *(asymmetric_loss, input, target, process_group),
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            clip=clip,
            detach_focal=detach_focal,
            mask=mask,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.elementwise_constant(weight, input, "weight")
    gamma_neg = arguments.nonnegative_number(gamma_neg, "gamma_neg")
    gamma_pos = arguments.nonnegative_number(gamma_pos, "gamma_pos")
    clip = arguments.clip_below_one(clip)
    detach_focal = arguments.flag(detach_focal, "detach_focal")
    label_smoothing = arguments.number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, input)
    logits = arguments.as_rows(input)
    native = _is_native(logits, target_labels, mask_labels, ignore_index)
    loss = _backend(native, overwriting, ranks_of(process_group)).asymmetric_loss(
        logits,
        target_labels,
        mask_labels,
        weight=weight,
        gamma_neg=gamma_neg,
        gamma_pos=gamma_pos,
        clip=clip,
        detach_focal=detach_focal,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(input.shape) if reduction == "none" else loss


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: LabelsLike,
    *,
    threshold: Tensor | float = 0.0,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Multi-label categorical cross-entropy (ZLPR), one pass over each row.

    Per row, with logits x, positives P, negatives Q and threshold s0:
    L = log(e^-s0 + sum_P e^-x) + log(e^s0 + sum_Q e^x). It pushes positives above the threshold and
    negatives below; predict ``x > threshold``. Soft targets y count in both sums, with weights y
    and 1 - y. Source: Su et al., "ZLPR: A Novel Loss for Multi-label Classification" (2022),
    arXiv:2208.02955. Positives are excluded from the second sum, never subtracted.

    Args:
        input: logits ``[..., C]``, fp32, bf16, fp16 or fp64. Rows may be strided.
        target: as in :func:`sigmoid_cross_entropy`.
        threshold: s0, a number or a floating tensor of shape ``[]``, ``[...]`` or ``[..., 1]``;
            a tensor may require grad.
        mask: as in :func:`sigmoid_cross_entropy`; masked labels are in neither sum.
        weight: constant factor >= 0 per row: a number or shape ``[...]`` or ``[..., 1]``.
        ignore_index: as in :func:`sigmoid_cross_entropy`.
        reduction: over rows, with S = sum of weight * L: ``'none'`` (weight * L, shape ``[...]``),
            ``'sum'`` (S), ``'mean'`` and ``'batchmean'`` (S / number of rows), ``'mean_nonzero'``
            (S / number of nonzero weights), ``'weighted_mean'`` (S / sum of weights).
        normalizer: as in :func:`sigmoid_cross_entropy`.
        inplace_backward: as in :func:`sigmoid_cross_entropy`.
        grad_scale: as in :func:`sigmoid_cross_entropy`; also of the threshold's gradient.
        process_group: as in :func:`sigmoid_cross_entropy`.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[30.0, -5.0, -5.0, -5.0, -5.0, -5.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> round(mlloss_cuda.multilabel_categorical_crossentropy(logits, labels).item(), 6)
    0.033135
    """
    if (
        inplace_backward is False
        and is_one(grad_scale)
        and mask is weight is ignore_index is normalizer is process_group is None
        and is_zero(threshold)
    ):
        short = plain.multilabel_categorical_crossentropy(input, target, reduction)
        if short is not None:
            return short
    if is_spread(input, process_group):
        return over_shards(
            *(multilabel_categorical_crossentropy, input, target, process_group),
            threshold=threshold,
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.rowwise_constant(weight, input, "weight")
    threshold = arguments.row_threshold(threshold, input)
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, input)
    logits = arguments.as_rows(input)
    native = _is_native(logits, target_labels, mask_labels, ignore_index)
    loss = _backend(
        native, overwriting, ranks_of(process_group)
    ).multilabel_categorical_crossentropy(
        logits,
        target_labels,
        mask_labels,
        threshold=threshold,
        weight=weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


zlpr_loss = multilabel_categorical_crossentropy


def multilabel_ranking_loss(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
    inplace_backward: bool = False,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Log-sum-exp pairwise ranking loss (LSEP): every positive above every negative.

    Per row: L = log(1 + sum over (j positive, i negative) of e^(x_i - x_j)), in O(C), as the sum is
    a product of two. Only differences of logits count, so there is no threshold: predict the top k.
    Soft targets y count on both sides, with weights y and 1 - y. Rows without positives or without
    negatives give 0. Source: Li, Song and Luo, "Improving Pairwise Ranking for Multi-label Image
    Classification" (2017), arXiv:1704.03135.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`multilabel_categorical_crossentropy`, like all arguments that are not
            listed.
        mask: as in :func:`sigmoid_cross_entropy`; masked labels are in no pair.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, 1.0, -1.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> round(mlloss_cuda.multilabel_ranking_loss(logits, labels).item(), 6)
    0.349012
    """
    if (
        inplace_backward is False
        and is_one(grad_scale)
        and mask is weight is ignore_index is normalizer is process_group is None
    ):
        short = plain.multilabel_ranking_loss(input, target, reduction)
        if short is not None:
            return short
    if is_spread(input, process_group):
        return over_shards(
            *(multilabel_ranking_loss, input, target, process_group),
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            inplace_backward=inplace_backward,
            grad_scale=grad_scale,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.rowwise_constant(weight, input, "weight")
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    overwriting = arguments.overwriting(inplace_backward, grad_scale, reduction, input)
    logits = arguments.as_rows(input)
    native = _is_native(logits, target_labels, mask_labels, ignore_index)
    loss = _backend(native, overwriting, ranks_of(process_group)).multilabel_ranking_loss(
        logits,
        target_labels,
        mask_labels,
        weight=weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


lsep_loss = multilabel_ranking_loss


def multilabel_softmax_cross_entropy(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    normalize_target: bool = True,
    partition: str | None = None,
    partition_weight: float = 1.0,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
) -> Tensor:
    r"""Softmax cross-entropy against several labels, optionally with a loss of their number.

    Per row, with Z = sum of e^x: L = sum of t (log Z - x) with t = y / sum(y), a distribution over
    the labels (a row without positives gives 0), or t = y. A softmax says nothing of how many
    labels there are; ``partition`` adds partition_weight times

    - ``'poisson'``: Z - sum(y) log Z, the Poisson loss of the number sum(y) at the rate Z
    - ``'mse'``: (Z - sum(y))^2

    With t = y, ``'poisson'`` and weight 1, L is the Poisson loss sum of (e^x - y x) of all labels,
    that is, apart from constants, the generalised Kullback-Leibler divergence of e^x from y: the
    divergence of the distributions plus the one of the totals. Predict by e^x then.
    Source of t = y / sum(y): Mahajan et al., "Exploring the Limits of Weakly Supervised
    Pretraining" (2018), arXiv:1805.00932.

    Composed from PyTorch operations on every device, with dense temporaries ``[N, C]``.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`multilabel_categorical_crossentropy`, like all arguments that are not
            listed.
        normalize_target: whether t = y / sum(y), rather than y.
        partition: None, ``'poisson'`` or ``'mse'``.
        partition_weight: number >= 0.
        mask: as in :func:`sigmoid_cross_entropy`; masked labels are in no sum.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, 1.0, -1.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 1]])
    >>> round(mlloss_cuda.multilabel_softmax_cross_entropy(logits, labels).item(), 6)
    0.849012
    """
    if is_spread(input, process_group):
        return over_shards(
            *(multilabel_softmax_cross_entropy, input, target, process_group),
            normalize_target=normalize_target,
            partition=partition,
            partition_weight=partition_weight,
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
        )
    arguments.check_input(input)
    target_labels = targets.normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.rowwise_constant(weight, input, "weight")
    normalize_target = arguments.flag(normalize_target, "normalize_target")
    arguments.one_of(partition, "partition", arguments.PARTITIONS)
    partition_weight = arguments.nonnegative_number(partition_weight, "partition_weight")
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    logits = arguments.as_rows(input)
    _check_contents(logits, target_labels, mask_labels, ignore_index)
    loss = reference.multilabel_softmax_cross_entropy(
        logits,
        target_labels,
        mask_labels,
        normalize_target=normalize_target,
        partition=partition,
        partition_weight=partition_weight,
        weight=weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
        ranks=ranks_of(process_group),
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


def multilabel_margin_loss(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    margin: float = 1.0,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
) -> Tensor:
    r"""Hinge loss of all pairs: every positive above every negative by a margin.

    Per row: L = 1/C sum over (j positive, i negative) of max(0, margin - (x_j - x_i)), C counting
    unmasked labels. With margin 1 this is ``torch.nn.functional.multilabel_margin_loss``, whose
    target is a list of label ids. Computed in fp64 by sorting each row, O(C log C) instead of a
    term for each pair, with PyTorch operations on every device and dense temporaries ``[N, C]``.
    A pair that meets the margin exactly has no gradient.

    Args:
        input: logits ``[..., C]``.
        target: as in :func:`multilabel_categorical_crossentropy`, like all arguments that are not
            listed, but hard: soft values are an error on the CPU and make the loss of their rows
            NaN on a GPU.
        margin: a finite number.
        mask: as in :func:`sigmoid_cross_entropy`; masked labels are in no pair and not in C.

    Returns:
        The loss, fp32 (fp64 for fp64 input): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, 1.5, -1.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0]])
    >>> round(mlloss_cuda.multilabel_margin_loss(logits, labels).item(), 6)
    0.166667
    """
    if is_spread(input, process_group):
        return over_shards(
            *(multilabel_margin_loss, input, target, process_group),
            margin=margin,
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    weight = arguments.rowwise_constant(weight, input, "weight")
    margin = arguments.finite_number(margin, "margin")
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    logits = arguments.as_rows(input)
    _check_contents(logits, target_labels, mask_labels, ignore_index)
    arguments.check_hard_target(logits, target_labels, mask_labels, ignore_index)
    loss = reference.multilabel_margin_loss(
        logits,
        target_labels,
        mask_labels,
        margin=margin,
        weight=weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
        ranks=ranks_of(process_group),
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss


def tversky_loss(
    input: Tensor,
    target: LabelsLike,
    *,
    from_logits: bool = True,
    axis: str = "samples",
    smooth: float = 1e-5,
    alpha: float = 0.5,
    beta: float = 0.5,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
) -> Tensor:
    r"""Tversky loss: one minus the overlap of prediction and target, with two kinds of errors.

    With p = sigmoid(x), I = sum of p y, FP = sum of p (1 - y) and FN = sum of (1 - p) y over
    unmasked elements: L = 1 - (2 I + smooth) / (2 I + 2 alpha FP + 2 beta FN + smooth), which for
    alpha = beta = 0.5 is the Dice loss. Source: Salehi, Erdogmus and Gholipour, "Tversky loss
    function for image segmentation using 3D fully convolutional deep networks" (2017),
    arXiv:1706.05721.

    Composed from PyTorch operations on every device, with dense temporaries ``[N, C]``.

    Args:
        input: logits ``[..., C]``, or probabilities.
        target: as in :func:`sigmoid_cross_entropy`.
        from_logits: whether input holds logits. Probabilities outside [0, 1] give NaN, or with
            :func:`mlloss_cuda.debug_checks` an error.
        axis: what the sums run over: ``'samples'`` (the labels of a row: one loss per row),
            ``'classes'`` (all rows: one loss per label) or ``'micro'`` (everything: one loss).
        smooth: number >= 0. Where nothing is positive and nothing predicted, L is 0.
        alpha: cost >= 0 of false positives.
        beta: cost >= 0 of false negatives.
        mask: as in :func:`sigmoid_cross_entropy`.
        weight: constant factor >= 0 per loss: a number, or shape ``[...]`` or ``[..., 1]`` for
            samples, ``[C]`` for classes, ``[]`` for micro.
        ignore_index: as in :func:`sigmoid_cross_entropy`.
        reduction: over these losses, with S = sum of weight * L: ``'none'`` (shape ``[...]``,
            ``[C]`` or ``[]``), ``'sum'`` (S), ``'mean'`` and ``'batchmean'`` (S / their number),
            ``'mean_nonzero'`` (S / number of nonzero weights), ``'weighted_mean'`` (S / sum of
            weights).
        normalizer: as in :func:`sigmoid_cross_entropy`.
        process_group: as in :func:`sigmoid_cross_entropy`.

    Returns:
        The loss, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, -3.0, 1.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 1], [2]])
    >>> mlloss_cuda.tversky_loss(logits, labels, alpha=0.3, beta=0.7, reduction="none")
    tensor([0.1794, 0.3253])
    """
    if is_spread(input, process_group):
        return over_shards(
            *(tversky_loss, input, target, process_group),
            from_logits=from_logits,
            axis=axis,
            smooth=smooth,
            alpha=alpha,
            beta=beta,
            mask=mask,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
        )
    arguments.check_input(input)
    target_labels = normalize_target(target, input, ignore_index)
    mask_labels = normalize_mask(mask, input)
    arguments.one_of(axis, "axis", arguments.AXES)
    weight = arguments.unit_constant(weight, input, "weight", axis)
    from_logits = arguments.flag(from_logits, "from_logits")
    smooth = arguments.nonnegative_number(smooth, "smooth")
    alpha = arguments.nonnegative_number(alpha, "alpha")
    beta = arguments.nonnegative_number(beta, "beta")
    ignore_index = arguments.ignored_value(ignore_index)
    normalizer = arguments.denominator(normalizer, reduction, input)
    rows = arguments.as_rows(input)
    _check_contents(rows, target_labels, mask_labels, ignore_index)
    if not from_logits:
        arguments.check_probabilities(rows, target_labels, mask_labels, ignore_index, "input")
    loss = reference.tversky_loss(
        rows,
        target_labels,
        mask_labels,
        from_logits=from_logits,
        axis=axis,
        smooth=smooth,
        alpha=alpha,
        beta=beta,
        weight=weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        reduction=reduction,
        ranks=ranks_of(process_group),
    )
    if reduction != "none" or axis == "classes":
        return loss
    return loss.view(input.shape[:-1] if axis == "samples" else ())


def dice_loss(  # noqa: D417 (documented once, where the docstring says)
    input: Tensor,
    target: LabelsLike,
    *,
    from_logits: bool = True,
    axis: str = "samples",
    smooth: float = 1e-5,
    mask: LabelsLike | None = None,
    weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: Group = None,
) -> Tensor:
    r"""Dice loss: one minus the overlap of prediction and target.

    L = 1 - (2 I + smooth) / (P + T + smooth) with p = sigmoid(x) and the sums I of p y, P of p and
    T of y over unmasked elements: :func:`tversky_loss` with alpha = beta = 0.5. Source: Milletari,
    Navab and Ahmadi, "V-Net" (2016), arXiv:1606.04797, here with P and T not squared.

    Args:
        input: as in :func:`tversky_loss`, like all other arguments.

    Returns:
        The loss, as :func:`tversky_loss` does.

    Raises:
        TypeError, ValueError: as in :func:`sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, -3.0, 1.0]])
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 1], [2]])
    >>> round(mlloss_cuda.dice_loss(logits, labels, axis="micro").item(), 6)
    0.239224
    """
    return tversky_loss(
        input,
        target,
        from_logits=from_logits,
        axis=axis,
        smooth=smooth,
        mask=mask,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        process_group=process_group,
    )


def _backend(native: bool, overwriting: Overwriting | None, ranks: Ranks) -> Any:
    """Return what holds the functions that compute: a module, or an object in its place."""
    if not ranks.alone and native:
        return ops.over_ranks(ranks, overwriting)
    if not ranks.alone and overwriting is None:
        return reference.OverRanks(ranks)
    if overwriting is None:
        return ops if native else reference
    return (
        ops.over_input(overwriting.grad_scale) if native else inplace.Reference(overwriting, ranks)
    )


def _is_native(
    logits: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> bool:
    """Whether native kernels serve. They look at label ids by themselves."""
    native = ops.is_native(logits)
    if not native or targets.debugging():
        _check_contents(logits, target, mask, ignore_index)
    return native


def _check_contents(
    logits: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> None:
    ops.check_contents(target, mask, logits)
    arguments.check_target_values(logits, target, mask, ignore_index)
