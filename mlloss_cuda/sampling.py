"""Losses of a few labels per row, and how to draw them.

Where only some labels of a row are known, or where going over all of them takes too long, the loss
is that of a shortlist: the positives and some negatives. :func:`sampled_linear_loss` computes it
from the rows of the weights that it names, the samplers below draw the shortlists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, functional, linear, reference
from .targets import (
    INDEX_DTYPES,
    MASK_DTYPES,
    SparseLabels,
    check_strided,
    contents_may_be_checked,
    has_value,
    row_of_entry,
)

# Bytes of weights that are gathered at a time.
_GATHERED_BYTES = 8 << 20

LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid_cross_entropy": functional.sigmoid_cross_entropy,
    "multilabel_categorical_crossentropy": functional.multilabel_categorical_crossentropy,
}


def sampled_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    log_q: Tensor | None = None,
    loss: str = "sigmoid_cross_entropy",
    loss_weight: Tensor | float | None = None,
    sparse_grad: bool = True,
    **loss_arguments: Any,
) -> Tensor:
    r"""Loss of a linear layer's logits for a shortlist of labels per row.

    The same as the loss of all logits with a mask that selects each row's shortlist, in the time
    and memory of the shortlists: the weights are gathered a few rows at a time, and no tensor
    ``[B, K, d]`` exists.

    Args:
        hidden: ``[B, d]``, fp32, bf16, fp16 or fp64.
        weight: of the linear layer, ``[C, d]``, of the dtype of hidden.
        labels: the shortlists, ``[B, K]``, int32 or int64; negative ids are padding, which never
            counts. A label that a row lists several times counts once, with the largest of its
            targets: a negative that happens to be drawn although it is a positive does no harm.
        target: ``[B, K]``, in [0, 1], of any bool, integer or floating dtype.
        bias: ``[C]`` or None.
        mask: ``[B, K]``, bool or uint8: entries to use; None for all.
        log_q: logarithms of how likely each label is to be among the negatives of a row, ``[C]``
            or, for the shortlists, ``[B, K]``. They are subtracted from the logits, of positives as
            of negatives; what the weights learn are then the logits of all labels, as if all the
            negatives had been there. Without, the rarer a label is drawn, the higher it comes out.
            See :func:`log_inclusion`. Source: Bengio and Senecal, "Adaptive Importance Sampling to
            Accelerate Training of a Neural Probabilistic Language Model" (2008).
        loss: ``'sigmoid_cross_entropy'`` or ``'multilabel_categorical_crossentropy'``.
        loss_weight: what the loss calls ``weight``, for logits ``[B, K]``.
        sparse_grad: whether the gradients of weight and bias are sparse tensors of the labels that
            occur (for torch.optim.SGD, Adagrad or SparseAdam; not for Adam, nor for
            ``clip_grad_norm_``), rather than dense ones. They are summed per label in the order of
            the rows.
        loss_arguments: other arguments of the loss, for logits ``[B, K]``.

    Returns:
        The loss.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value; on the CPU, a label out of
            range. On a GPU, such a label gives NaN in its row.

    >>> import torch, mlloss_cuda
    >>> hidden, weight = torch.ones(2, 4), torch.full((100, 4), 0.5)
    >>> labels = torch.tensor([[7, 93, -1], [12, 5, 5]])
    >>> target = torch.tensor([[1, 0, 0], [1, 0, 0]])
    >>> round(mlloss_cuda.sampled_linear_loss(hidden, weight, labels, target).item(), 6)
    1.126928
    """
    arguments.one_of(loss, "loss", tuple(LOSSES))
    arguments.flag(sparse_grad, "sparse_grad")
    linear.as_layer(hidden, weight, bias, None)  # checks
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [B, d], got {list(hidden.shape)}")
    labels = _checked_labels(labels, hidden, weight.shape[0])
    for name, tensor, dtypes in (("target", target, None), ("mask", mask, MASK_DTYPES)):
        _check_like_labels(tensor, name, labels, dtypes)
    listed = labels >= 0 if mask is None else (labels >= 0) & (mask != 0)
    ignored = arguments.ignored_value(loss_arguments.get("ignore_index"))
    if ignored is not None:
        listed = listed & ~has_value(target, ignored)
    used = _first_of_equal(labels, target, listed)
    dtype = linear.product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _SampledLogits.apply(hidden, weight, bias, labels, used, sparse_grad, dtype)
        if log_q is not None:
            logits = logits - _log_q_of(log_q, labels, weight.shape[0], logits)
        return LOSSES[loss](logits, target, mask=used, weight=loss_weight, **loss_arguments)


def _checked_labels(labels: Tensor, hidden: Tensor, num_labels: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype not in INDEX_DTYPES:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int32 or int64 tensor, got {got}")
    check_strided(labels, "labels")
    if labels.dim() != 2 or labels.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"labels must have shape [{hidden.shape[0]}, K], a row for each of hidden, "
            f"got {list(labels.shape)}"
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"labels must be on the device of hidden, {hidden.device}, got {labels.device}"
        )
    labels = labels.long()
    if contents_may_be_checked(labels) and labels.numel() > 0:
        largest = int(labels.max())
        if largest >= num_labels:
            raise ValueError(
                f"labels must be below {num_labels}, the number of rows of weight, got {largest}"
            )
    return labels


def _check_like_labels(
    tensor: Tensor | None, name: str, labels: Tensor, dtypes: tuple[torch.dtype, ...] | None
) -> None:
    if tensor is None and name == "mask":
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_strided(tensor, name)
    if dtypes is not None and tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be bool or uint8, got {tensor.dtype}")
    if tensor.shape != labels.shape:
        raise ValueError(
            f"{name} must have the shape of labels, {list(labels.shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != labels.device:
        raise ValueError(
            f"{name} must be on the device of labels, {labels.device}, got {tensor.device}"
        )


def _first_of_equal(labels: Tensor, target: Tensor, listed: Tensor) -> Tensor:
    """Of entries that list the same label in a row, select the first with the largest target."""
    # NaN, which makes a loss NaN, must not be dropped.
    values = target.float().nan_to_num(nan=float("inf"))
    order = values.sort(dim=1, descending=True, stable=True).indices
    ids = torch.where(listed, labels, -1).gather(1, order)
    ids, own = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.zeros_like(listed).scatter(1, order.gather(1, own), first & (ids >= 0))


def _log_q_of(log_q: Tensor, labels: Tensor, num_labels: int, logits: Tensor) -> Tensor:
    if not isinstance(log_q, Tensor) or not log_q.dtype.is_floating_point:
        raise TypeError("log_q must be a floating tensor or None")
    if log_q.requires_grad:
        raise ValueError("log_q must not require grad; it is a constant (detach it)")
    if log_q.device != logits.device:
        raise ValueError(
            f"log_q must be on the device of hidden, {logits.device}, got {log_q.device}"
        )
    if log_q.shape == (num_labels,):
        log_q = log_q[labels.clamp(0, num_labels - 1)]
    if log_q.shape != labels.shape:
        raise ValueError(
            f"log_q must have shape [{num_labels}] or that of labels, {list(labels.shape)}, "
            f"got {list(log_q.shape)}"
        )
    return log_q.to(logits.dtype)


class _SampledLogits(torch.autograd.Function):
    """Logits ``[B, K]`` of the labels that are `used`, 0 elsewhere, computed in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        used: Tensor,
        sparse_grad: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ids, out_of_range = _ids_in_range(labels, used, weight.shape[0])
        ctx.save_for_backward(hidden, weight, ids, used)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.sparse_grad = sparse_grad
        rows, count = ids.shape
        logits = hidden.new_empty(rows, count, dtype=dtype)
        row_bytes = max(1, count * weight.shape[1] * weight.element_size())
        step = max(1, _GATHERED_BYTES // row_bytes)
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            gathered = weight[ids[part]].to(dtype)
            logits[part] = torch.bmm(gathered, hidden[part, :, None].to(dtype))[:, :, 0]
        if bias is not None:
            logits += bias[ids].to(dtype)
        logits = torch.where(used, logits, 0.0)
        return torch.where(out_of_range, float("nan"), logits)

    @staticmethod
    def jvp(*_: Any) -> None:
        raise RuntimeError("mlloss_cuda.sampled_linear_loss has no forward-mode derivative")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, used = ctx.saved_tensors
        # Sums in the dtype of the weights: under autocast that is the higher one.
        grad = torch.where(used, grad, 0.0).to(weight.dtype)
        of_hidden = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_hidden = torch.zeros_like(hidden)
            if ids.numel() > 0:
                sums = torch.nn.functional.embedding_bag(
                    ids, weight, mode="sum", per_sample_weights=grad
                )
                # A row without labels has a sum of others' weights times 0.
                sums = torch.where(used.any(dim=1, keepdim=True), sums, 0.0)
                of_hidden = sums.to(hidden.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # Entries in the order of their labels; of a label, in that of the rows.
            flat = torch.where(used, ids, weight.shape[0]).flatten()
            sorted_ids, order = flat.sort(stable=True)
            present, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
            is_label = present < weight.shape[0]
            values = grad.flatten()[order]
            if ctx.needs_input_grad[1]:
                sums = weight.new_zeros(present.shape[0], weight.shape[1])
                if ids.numel() > 0:
                    sums = torch.nn.functional.embedding_bag(
                        order // ids.shape[1],
                        hidden.to(weight.dtype),
                        counts.cumsum(0) - counts,
                        mode="sum",
                        per_sample_weights=values,
                    )
                of_weight = _gradient(present, sums, is_label, weight, ctx.sparse_grad)
            if ctx.needs_input_grad[2]:
                sums = values.new_zeros(present.shape[0], dtype=ctx.bias_dtype)
                if ids.numel() > 0:
                    values = values.to(reference.compute_dtype(values))
                    sums = torch.segment_reduce(values, "sum", lengths=counts).to(ctx.bias_dtype)
                like = sums.new_empty(()).expand(weight.shape[0])
                of_bias = _gradient(present, sums, is_label, like, ctx.sparse_grad)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _ids_in_range(labels: Tensor, used: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Ids that may be read, and which used ones are out of range.

    In the place of what is not used stands a label that the row uses: its weights, times 0, do no
    harm that they do not do anyway.
    """
    out_of_range = used & (labels >= num_labels)
    fits = used & ~out_of_range
    own = torch.where(fits, labels, 0)
    if labels.shape[1] == 0:
        return own, out_of_range
    return torch.where(fits, labels, own.amax(dim=1, keepdim=True)), out_of_range


def _gradient(labels: Tensor, sums: Tensor, is_label: Tensor, like: Tensor, sparse: bool) -> Tensor:
    """The gradient with a row of `sums` for each of the labels."""
    labels, sums = labels[is_label], sums[is_label]
    if sparse:
        return torch.sparse_coo_tensor(
            labels[None], sums, like.shape, is_coalesced=True, check_invariants=False
        )
    return torch.zeros_like(like, dtype=sums.dtype).index_copy(0, labels, sums)


# ---- Samplers ------------------------------------------------------------------------------------
# They take what is known to be positive and return what a loss is to look at: SparseLabels with
# observed_only=True, that is, listed labels with their targets 0 or 1, everything else missing. A
# loss takes them as its target; :func:`shortlists` makes the arguments of `sampled_linear_loss`.


def sample_labels(
    positives: SparseLabels,
    num_labels: int,
    count: int,
    *,
    frequencies: Tensor | None = None,
    alpha: float = 0.75,
    generator: torch.Generator | None = None,
) -> SparseLabels:
    """Draw negatives for each row among the labels: fixed row, random label.

    Args:
        positives: the positives of each row.
        num_labels: C.
        count: labels to draw for each row, with replacement.
        frequencies: how often each label occurs, ``[C]``: labels are drawn with probabilities
            proportional to frequency^alpha. None: all labels alike.
        alpha: see there; the default is that of word2vec, and 0 takes all labels of a frequency
            above 0 alike. Without frequencies it has no meaning.
        generator: source of randomness, on the device of the labels.

    Returns:
        The positives with target 1, then what was drawn with target 0, unless it is a positive of
        the row. See :func:`log_inclusion` for the correction.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels, sampling
    >>> positives = SparseLabels.from_lists([[3], [1, 4]])
    >>> generator = torch.Generator().manual_seed(0)
    >>> known = sampling.sample_labels(positives, 6, 2, generator=generator)
    >>> known.observed_only, known.offsets.tolist()
    (True, [0, 2, 6])
    """
    _check_positives(positives)
    arguments.integer(count, "count", 0)
    arguments.integer(num_labels, "num_labels", 1)
    rows = positives.num_rows
    if frequencies is None:
        drawn = torch.randint(
            num_labels, (rows, count), generator=generator, device=positives.indices.device
        )
    else:
        probabilities = drawing_probabilities(frequencies, alpha)
        if probabilities.shape[0] != num_labels:
            raise ValueError(
                f"frequencies must have shape [{num_labels}], got {list(frequencies.shape)}"
            )
        # By the inverse of the cumulative sum: torch.multinomial takes 2^24 categories at most.
        bounds = probabilities.cumsum(0)
        places = torch.rand(
            rows, count, generator=generator, dtype=torch.float64, device=bounds.device
        )
        drawn = torch.searchsorted(bounds, places * bounds[-1], right=True)
        drawn = drawn.clamp(max=num_labels - 1)
    return _with_negatives(positives, drawn)


def sample_rows(
    positives: SparseLabels, count: int, *, generator: torch.Generator | None = None
) -> SparseLabels:
    """Draw negatives for each positive among the rows: fixed label, random row.

    For every positive (row, label), the label becomes a negative of `count` rows drawn at random,
    unless it is one of their positives. So each label has as many negatives as positives, times
    count, whatever its frequency.

    Args:
        positives: the positives of each row; at least one row.
        count: rows to draw for each positive.
        generator: source of randomness, on the device of the labels.

    Returns:
        As :func:`sample_labels`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels, sampling
    >>> positives = SparseLabels.from_lists([[2], [], []])
    >>> generator = torch.Generator().manual_seed(1)
    >>> sampling.sample_rows(positives, 1, generator=generator).values.tolist()
    [1.0, 0.0]
    """
    _check_positives(positives)
    arguments.integer(count, "count", 0)
    labels = positives.indices.long().repeat_interleave(count)
    rows = torch.randint(
        max(positives.num_rows, 1), labels.shape, generator=generator, device=labels.device
    )
    rows, order = torch.where(labels >= 0, rows, positives.num_rows).sort(stable=True)
    steps = torch.arange(positives.num_rows + 1, device=labels.device)
    return _joined(positives, labels[order], torch.searchsorted(rows, steps))


def in_batch(positives: SparseLabels) -> SparseLabels:
    """Take the positives of the other rows as the negatives of each row.

    Args:
        positives: the positives of each row.

    Returns:
        As :func:`sample_labels`: all rows list the same labels, those that occur in any of them.

    Raises:
        TypeError: not ``SparseLabels``.

    >>> from mlloss_cuda import SparseLabels, sampling
    >>> known = sampling.in_batch(SparseLabels.from_lists([[7], [9, 2]]))
    >>> known.indices.tolist(), known.values.tolist()
    ([7, 2, 9, 9, 2, 7], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    """
    _check_positives(positives)
    present = positives.indices.long()
    present = torch.unique(present[present >= 0])
    return _with_negatives(positives, present.expand(positives.num_rows, -1))


def drawing_probabilities(frequencies: Tensor, alpha: float = 0.75) -> Tensor:
    """Return frequency^alpha of labels ``[C]``, divided by their sum, fp64; 0 stays 0.

    Raises:
        TypeError, ValueError: a wrong type, shape or value.
    """
    if not isinstance(frequencies, Tensor):
        raise TypeError(f"frequencies must be a tensor, got {type(frequencies).__name__}")
    if frequencies.dim() != 1:
        raise ValueError(f"frequencies must have shape [C], got {list(frequencies.shape)}")
    arguments.finite_number(alpha, "alpha")
    powers = frequencies.double() ** alpha
    powers = torch.where(frequencies == 0, 0.0, powers)
    if powers.is_cpu and not (bool((frequencies >= 0).all()) and 0 < powers.sum() < float("inf")):
        raise ValueError("frequencies must be finite, not negative, and not all 0")
    return powers / powers.sum()


def log_inclusion(probabilities: Tensor, count: int) -> Tensor:
    """Return the ``log_q`` of negatives: log(1 - (1 - p)^count), fp32.

    That is how likely a label is among `count` that are drawn with replacement. With it, the logits
    that minimise the loss over the samples are those that minimise it over all labels. Labels that
    are never drawn have 0, not -inf.

    Args:
        probabilities: of the labels, ``[C]``, as :func:`drawing_probabilities` returns them.
        count: labels drawn for each row.

    >>> import torch
    >>> from mlloss_cuda import sampling
    >>> sampling.log_inclusion(torch.tensor([0.5, 0.25, 0.25, 0.0]), 2).exp().tolist()
    [0.75, 0.4375, 0.4375, 1.0]
    """
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {type(probabilities).__name__}")
    arguments.integer(count, "count", 0)
    probabilities = probabilities.double()
    if contents_may_be_checked(probabilities) and not bool(
        ((probabilities >= 0) & (probabilities <= 1)).all()
    ):
        raise ValueError("probabilities must lie in [0, 1]")
    included = -torch.expm1(count * torch.log1p(-probabilities))
    return torch.where(included > 0, included.log(), 0.0).float()


class Shortlists(NamedTuple):
    """What :func:`sampled_linear_loss` takes, ``[B, K]`` each.

    Attributes:
        labels: label ids, -1 where a row has less than K.
        target: fp32.
    """

    labels: Tensor
    target: Tensor


def shortlists(known: SparseLabels) -> Shortlists:
    """Turn what a sampler returns into rows of the same length, the longest one's.

    Raises:
        TypeError: not ``SparseLabels``.

    >>> from mlloss_cuda import SparseLabels, sampling
    >>> labels, target = sampling.shortlists(sampling.in_batch(SparseLabels.from_lists([[7], [9]])))
    >>> labels.tolist(), target.tolist()
    ([[7, 9], [9, 7]], [[1.0, 0.0], [1.0, 0.0]])
    """
    if not isinstance(known, SparseLabels):
        raise TypeError(f"known must be SparseLabels, got {type(known).__name__}")
    lengths = known.offsets[1:] - known.offsets[:-1]
    width = int(lengths.max()) if known.num_rows > 0 else 0
    rows, _ = row_of_entry(known)
    places = torch.arange(known.indices.shape[0], device=rows.device) - known.offsets[rows]
    labels = known.indices.new_full((known.num_rows, width), -1, dtype=torch.int64)
    labels[rows, places] = known.indices.long()
    target = torch.zeros(labels.shape, device=labels.device)
    target[rows, places] = 1.0 if known.values is None else known.values.float()
    return Shortlists(labels, target)


def _check_positives(positives: SparseLabels) -> None:
    if not isinstance(positives, SparseLabels):
        raise TypeError(f"positives must be SparseLabels, got {type(positives).__name__}")
    if positives.values is not None or positives.observed_only:
        raise ValueError(
            "positives must list positives and nothing else: without values and observed_only"
        )


def _with_negatives(positives: SparseLabels, drawn: Tensor) -> SparseLabels:
    """Put `drawn` ``[N, K]`` behind the positives."""
    steps = torch.arange(drawn.shape[0] + 1, device=drawn.device) * drawn.shape[1]
    return _joined(positives, drawn.flatten(), steps)


def _joined(positives: SparseLabels, labels: Tensor, offsets: Tensor) -> SparseLabels:
    """Put negatives, in the order of their rows, behind the positives of the same row."""
    rows, _ = row_of_entry(positives)
    own_rows, _ = row_of_entry(SparseLabels(labels, offsets))
    all_labels = torch.cat([positives.indices.long(), labels])
    all_rows = torch.cat([rows, own_rows])
    is_negative = torch.arange(all_rows.shape[0], device=rows.device) >= rows.shape[0]
    # The first of equal labels of a row comes first if it is the positive one.
    most = all_labels.amax() if all_labels.shape[0] > 0 else 0
    keys, order = torch.unique(all_rows * (most + 2) + all_labels + 1, return_inverse=True)
    first = torch.full(keys.shape, all_rows.shape[0], device=rows.device)
    places = torch.arange(all_rows.shape[0], device=rows.device)
    first = first.scatter_reduce(0, order, places, "amin")
    keep = (first[order] == places) & (all_labels >= 0)
    all_labels, all_rows, is_negative = (x[keep] for x in (all_labels, all_rows, is_negative))
    all_rows, order = all_rows.sort(stable=True)
    boundaries = torch.searchsorted(
        all_rows, torch.arange(positives.num_rows + 1, device=rows.device)
    )
    return SparseLabels(
        all_labels[order],
        boundaries,
        torch.where(is_negative[order], 0.0, 1.0),
        observed_only=True,
    )
