"""The largest scores of a row and their labels, the same on every device and in any parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import arguments
from .ranks import ProcessGroup, gathered
from .sharding import LabelShard, check_plain, label_range

# [N, labels] that a class below makes, orders and turns into scores and labels again.
Ordered = tuple[Tensor, ...]


def top_labels(
    scores: Tensor, k: int, *, process_group: ProcessGroup | LabelShard | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row and their labels.

    Unlike ``torch.topk``, which may pick any of several equal scores.

    Args:
        scores: ``[..., C]``, floating.
        k: 1 to C.
        process_group: where labels are spread over ranks of ``torch.distributed``, and scores has
            those of this rank: see :func:`mlloss_cuda.sigmoid_cross_entropy`. Every rank then
            returns the best ones of all labels.

    Returns:
        Scores ``[..., k]`` in descending order, of the dtype of scores, and labels ``[..., k]``,
        int64. Among equal scores the smallest labels come first; NaN counts as largest.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.

    >>> import torch
    >>> scores, labels = top_labels(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), 3)
    >>> labels.tolist()
    [[1, 3, 2]]
    """
    check_plain(scores, "scores")
    arguments.check_input(scores, "scores", "scores")
    arguments.integer(k, "k", 1)
    ranks, begin, num_labels = label_range(scores, process_group, "scores", {"k": k})
    if not isinstance(num_labels, Tensor) and k > num_labels:
        raise ValueError(f"k must be at most the number of labels, {num_labels}, got {k}")
    order = order_of(scores.dtype)
    rows = arguments.as_rows(scores.detach())
    own = min(k, scores.shape[-1])
    values, labels = order.scores_and_labels(order.best(order.of(rows, 0), own))
    values, labels = values.to(scores.dtype), labels + begin
    if ranks.labels is not None:
        values, labels = best_of_ranks(values, labels, k, lambda own: gathered(own, ranks.labels))
    shape = (*scores.shape[:-1], k)
    return values.view(shape), labels.view(shape)


def best_of_ranks(
    scores: Tensor, labels: Tensor, k: int, exchange: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the k best of what ranks have found among their labels: ``[rows, k]``.

    Args:
        scores: ``[N, at most k]``, of this rank.
        labels: those of the scores, among all labels.
        k: at most the number of labels.
        exchange: from ``[N, k]`` of this rank to ``[ranks, rows, k]``, what all have of some rows.
    """
    filler = k - scores.shape[1]
    scores = torch.nn.functional.pad(scores, (0, filler))
    labels = torch.nn.functional.pad(labels, (0, filler), value=-1)
    return merge_top_labels(exchange(scores).unbind(), exchange(labels).unbind(), k)


def merge_top_labels(
    scores: list[Tensor] | tuple[Tensor, ...], labels: list[Tensor] | tuple[Tensor, ...], k: int
) -> tuple[Tensor, Tensor]:
    """Return the k best of what :func:`top_labels` has found in several parts of the labels.

    For label shards: each finds its own k best, with the ids of all labels.

    Args:
        scores: tensors ``[N, K]``, floating, of one dtype; K may differ.
        labels: tensors ``[N, K]``, int64; a negative label stands for none.
        k: at most the number of columns there are.

    Returns:
        Scores and labels ``[N, k]``, as those of :func:`top_labels`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.

    >>> import torch
    >>> scores = [torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 1.5]])]
    >>> labels = [torch.tensor([[7, 9]]), torch.tensor([[4, 3]])]
    >>> merge_top_labels(scores, labels, 3)[1].tolist()
    [[4, 7, 3]]
    """
    if len(scores) != len(labels) or not scores:
        raise ValueError(
            f"scores and labels must be as many tensors, at least one, got {len(scores)} and "
            f"{len(labels)}"
        )
    for own, ids in zip(scores, labels, strict=True):
        if not own.is_floating_point() or own.dtype != scores[0].dtype:
            raise TypeError("scores must be floating tensors of one dtype")
        if ids.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {ids.dtype}")
        if own.dim() != 2 or own.shape != ids.shape or len(own) != len(scores[0]):
            raise ValueError(
                f"scores and labels must be [N, K] alike, got {list(own.shape)} and "
                f"{list(ids.shape)}"
            )
    arguments.integer(k, "k", 1)
    all_scores, all_labels = torch.cat(list(scores), 1), torch.cat(list(labels), 1)
    if k > all_labels.shape[1]:
        raise ValueError(f"k must be at most the {all_labels.shape[1]} labels given, got {k}")
    # By label, then stably by score; what is no label comes last.
    places = torch.where(all_labels < 0, torch.iinfo(torch.int64).max, all_labels).argsort(1)
    all_scores, all_labels = all_scores.gather(1, places), all_labels.gather(1, places)
    ranks = torch.where(all_labels < 0, -torch.inf, all_scores)
    places = ranks.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return all_scores.gather(1, places), all_labels.gather(1, places)


def joined(a: Ordered, b: Ordered) -> Ordered:
    """What two parts hold, side by side."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(a, b, strict=True))


def order_of(dtype: torch.dtype) -> type[_OrderOfFloats | _OrderOfDoubles]:
    """The class below that serves scores of a dtype."""
    return _OrderOfDoubles if dtype == torch.float64 else _OrderOfFloats


class _OrderOfFloats:
    """int64 keys with the order that is wanted, largest first.

    The upper half is the score: the bits of floats are ordered as their numbers, those of negative
    ones but for the sign bit in reverse. The lower half makes the smallest label the largest key.
    """

    @staticmethod
    def of(scores: Tensor, first_label: int) -> Ordered:
        bits = (scores.float() + 0.0).view(torch.int32)  # -0 becomes 0, its equal
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = torch.where(scores.isnan(), 0x7FFFFFFF, order).to(torch.int64)
        labels = torch.arange(first_label, first_label + scores.shape[1], device=scores.device)
        return ((order << 32) | (0xFFFFFFFF - labels),)

    @staticmethod
    def best(ordered: Ordered, k: int) -> Ordered:
        (keys,) = ordered
        return (keys.topk(min(k, keys.shape[1]), dim=1).values,)

    @staticmethod
    def scores_and_labels(ordered: Ordered) -> tuple[Tensor, Tensor]:
        (keys,) = ordered
        order = (keys >> 32).to(torch.int32)
        bits = order ^ ((order >> 31) & 0x7FFFFFFF)
        return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


class _OrderOfDoubles:
    """Scores and labels of fp64, whose bits leave no room for labels: by a sort that is stable."""

    @staticmethod
    def of(scores: Tensor, first_label: int) -> Ordered:
        labels = torch.arange(first_label, first_label + scores.shape[1], device=scores.device)
        return scores, labels.expand_as(scores)

    @staticmethod
    def best(ordered: Ordered, k: int) -> Ordered:
        scores, labels = ordered
        scores, places = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], labels.gather(1, places[:, :k])

    @staticmethod
    def scores_and_labels(ordered: Ordered) -> tuple[Tensor, Tensor]:
        scores, labels = ordered
        return scores, labels
