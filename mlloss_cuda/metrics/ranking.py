"""Metrics of the k best labels of each row.

Definitions are those of pyxclib (kunaldahiya/pyxclib, `xclib.evaluation.xc_metrics`), which the
Extreme Classification Repository's tables are computed with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, topk
from ..targets import LabelsLike, SparseLabels, contents_may_be_checked, stand_in
from .elements import (
    UNKNOWN,
    Elements,
    num_labels_of,
    selected_elements,
    true_elements,
)
from .streaming import Metric

ROWS_WITHOUT_LABELS = ("count", "skip")
LABELS = ("all", "present")


class _Ranking(NamedTuple):
    """The k best labels of N rows."""

    labels: Tensor  # int64 [N, k], -1 where there is none
    hits: Tensor  # bool [N, k]
    true: Elements
    num_true: Tensor  # int64 [N]


class AtK(Metric):
    """Base of the metrics at k.

    Args:
        k: the metric is computed at 1 to k.
    """

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        self.k = arguments.integer(k, "k", 1)

    def _settings(self) -> dict[str, Any]:
        return {"k": self.k}

    def update(
        self,
        predicted: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        exclude: LabelsLike | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predicted: integer ``[N, K]``: label ids, best first; or floating ``[N, C]``: scores, of
                which the k largest are taken, the smallest label first among equal ones. A
                negative id, one that an earlier rank has, and a missing column (K or C below k)
                count as wrong labels.
            target: the labels of the N rows, in any format of the losses, without soft values.
            mask: the observed elements. What is not observed is neither right nor wrong: it is
                taken out of the ranking, where later labels move up, and out of the target.
            exclude: elements to be treated as if they were not observed: the pairs of the filter
                files of data sets with label features, for example (:func:`labels_of_pairs`).

        With ids and ``mask`` or ``exclude``, K should be larger than k by as many labels as may be
        taken out of a row.

        Raises:
            TypeError, ValueError: types, shapes, devices or contents that do not fit.
        """
        ranking = _ranked(predicted, target, mask, exclude, self.k)
        self.to(predicted.device)
        self._add(ranking)

    def _add(self, ranking: _Ranking) -> None:
        raise NotImplementedError


class MeanOverRowsAtK(AtK):
    """Base of the metrics at k that are a mean over rows.

    Args:
        k: the metric is computed at 1 to k.
        rows_without_labels: ``'count'``, as pyxclib does: nothing can be right in such a row, and
            it counts among the rows all the same, so that with a share s of them no P@1 is above
            1 - s; or ``'skip'``.
    """

    total: Tensor
    num_rows: Tensor

    def __init__(self, k: int = 5, *, rows_without_labels: str = "count") -> None:
        super().__init__(k)
        arguments.one_of(rows_without_labels, "rows_without_labels", ROWS_WITHOUT_LABELS)
        self.rows_without_labels = rows_without_labels
        self._add_state("total", (k,), torch.float64)
        self._add_state("num_rows", (), torch.int64)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "rows_without_labels": self.rows_without_labels}

    def _add(self, ranking: _Ranking) -> None:
        # A row without labels adds nothing to the sum, counted or not.
        self.total += self._of_rows(ranking).sum(0)
        if self.rows_without_labels == "skip":
            self.num_rows += (ranking.num_true > 0).sum()
        else:
            self.num_rows += len(ranking.num_true)

    def _of_rows(self, ranking: _Ranking) -> Tensor:
        """What rows have at each rank, float64 [N, k]."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the values at 1 to k, in [0, 1]: float64 ``[k]``, NaN before the first row."""
        return self.total / self.num_rows


class PrecisionAtK(MeanOverRowsAtK):
    """P@1 to P@k: the share of correct labels among the first 1 to k predicted, mean over rows.

    Arguments: see :class:`MeanOverRowsAtK`; methods: :class:`AtK`.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = PrecisionAtK(k=3)
    >>> metric.update(torch.tensor([[4, 1, 7], [2, 0, 5]]), SparseLabels.from_lists([[1, 4], [9]]))
    >>> metric.compute()
    tensor([0.5000, 0.5000, 0.3333], dtype=torch.float64)
    """

    def _of_rows(self, ranking: _Ranking) -> Tensor:
        return _so_far(ranking.hits) / _ranks(ranking)


class RecallAtK(MeanOverRowsAtK):
    """R@1 to R@k: the share of the row's labels among the first 1 to k predicted, mean over rows.

    Arguments: see :class:`MeanOverRowsAtK`; methods: :class:`AtK`.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = RecallAtK(k=3)
    >>> metric.update(torch.tensor([[4, 1, 7], [2, 0, 5]]), SparseLabels.from_lists([[1, 4], [9]]))
    >>> metric.compute()
    tensor([0.2500, 0.5000, 0.5000], dtype=torch.float64)
    """

    def _of_rows(self, ranking: _Ranking) -> Tensor:
        return _so_far(ranking.hits) / ranking.num_true.clamp(min=1)[:, None]


class HitAtK(MeanOverRowsAtK):
    """Hit@1 to hit@k: the share of rows with a correct label among the first 1 to k predicted.

    Arguments: see :class:`MeanOverRowsAtK`; methods: :class:`AtK`.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = HitAtK(k=3)
    >>> metric.update(torch.tensor([[4, 1, 7], [2, 0, 5]]), SparseLabels.from_lists([[1], [9]]))
    >>> metric.compute()
    tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def _of_rows(self, ranking: _Ranking) -> Tensor:
        return (_so_far(ranking.hits) > 0).to(torch.float64)


class NDCGAtK(MeanOverRowsAtK):
    """nDCG@1 to nDCG@k: gain 1 / log2(rank + 1) of each correct label, by the largest there can be.

    The largest for a row with n labels at k: the sum of the first min(n, k) gains. Järvelin and
    Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.

    Arguments: see :class:`MeanOverRowsAtK`; methods: :class:`AtK`.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = NDCGAtK(k=3)
    >>> metric.update(torch.tensor([[4, 1, 7], [2, 0, 5]]), SparseLabels.from_lists([[1, 4], [0]]))
    >>> metric.compute()
    tensor([0.5000, 0.8155, 0.8155], dtype=torch.float64)
    """

    def _of_rows(self, ranking: _Ranking) -> Tensor:
        return _discounted(ranking.hits.to(torch.float64)) / _largest_gain(ranking)


class _PropensityScored(AtK):
    """The ratio of two sums over rows: what was gained, and the most that can be."""

    gained: Tensor
    attainable: Tensor

    def __init__(self, inverse_propensity: Tensor, k: int = 5) -> None:
        super().__init__(k)
        arguments.check_input(inverse_propensity, "inverse_propensity", "weights")
        if inverse_propensity.dim() != 1:
            raise ValueError(
                "inverse_propensity must have shape [num_labels], got "
                f"{list(inverse_propensity.shape)}"
            )
        self.inverse_propensity = inverse_propensity.to(torch.float64)
        self._add_state("gained", (k,), torch.float64)
        self._add_state("attainable", (k,), torch.float64)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "inverse_propensity": self.inverse_propensity}

    def _add(self, ranking: _Ranking) -> None:
        weights = self.inverse_propensity = self.inverse_propensity.to(ranking.hits.device)
        rows, labels = ranking.true.rows_and_labels()
        for name, ids in (("target", labels), ("predicted", ranking.labels)):
            if contents_may_be_checked(ids) and ids.numel() and int(ids.max()) >= len(weights):
                raise ValueError(
                    f"{name} has label {int(ids.max())}, inverse_propensity is for {len(weights)} "
                    "labels"
                )
        if len(weights) == 0:
            return
        of_hits = torch.where(ranking.hits, weights[ranking.labels.clamp(min=0)], 0.0)
        # Per row the largest weights first: sort by weight, then stably by row.
        by_weight = torch.argsort(weights[labels], descending=True, stable=True)
        rows, places = torch.sort(rows[by_weight], stable=True)
        weights_of_rows = weights[labels[by_weight]][places]
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        best = torch.zeros_like(of_hits)
        first = rank < self.k
        best[rows[first], rank[first]] = weights_of_rows[first]
        self.gained += self._of_rows(of_hits, ranking).sum(0)
        self.attainable += self._of_rows(best, ranking).sum(0)

    def _of_rows(self, gains: Tensor, ranking: _Ranking) -> Tensor:
        """float64 [N, k] from the gain at each rank."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the values at 1 to k, in [0, 1]: float64 ``[k]``, NaN before the first label."""
        return self.gained / self.attainable


class PropensityScoredPrecisionAtK(_PropensityScored):
    """PSP@1 to PSP@k: precision with each correct label weighted by its inverse propensity.

    The ratio of two sums over all rows: the weights of the correct labels among the first k
    predicted, and the k largest weights among the labels of the row, which is the most that any
    prediction can get. Rows without labels add to neither. Jain, Prabhu and Varma, "Extreme
    multi-label loss functions", KDD 2016.

    Args:
        inverse_propensity: floating ``[num_labels]``, see the function of that name.
        k: the metric is computed at 1 to k.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = PropensityScoredPrecisionAtK(torch.tensor([1.0, 2.0, 5.0]), k=2)
    >>> metric.update(torch.tensor([[0, 1]]), SparseLabels.from_lists([[1, 2]]))
    >>> metric.compute()
    tensor([0.0000, 0.2857], dtype=torch.float64)
    """

    def _of_rows(self, gains: Tensor, ranking: _Ranking) -> Tensor:  # noqa: ARG002
        return gains.cumsum(1)


class PropensityScoredNDCGAtK(_PropensityScored):
    """PSnDCG@1 to PSnDCG@k: nDCG with each gain weighted by the label's inverse propensity.

    As in :class:`PropensityScoredPrecisionAtK` the ratio of two sums over all rows. Arguments:
    those of that class.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = PropensityScoredNDCGAtK(torch.tensor([1.0, 2.0, 5.0]), k=2)
    >>> metric.update(torch.tensor([[0, 1]]), SparseLabels.from_lists([[1, 2]]))
    >>> metric.compute()
    tensor([0.0000, 0.2015], dtype=torch.float64)
    """

    def _of_rows(self, gains: Tensor, ranking: _Ranking) -> Tensor:
        return _discounted(gains) / _largest_gain(ranking)


class GroupedPrecisionAtK(AtK):
    """What each group of labels adds to P@1 to P@k: frequent and rare labels, for example.

    The hits among the first k predicted whose label is in the group, divided by k and the number of
    rows; all groups together give P@k.

    Args:
        groups: integer ``[num_labels]``: the group of each label, from 0.
        k: the metric is computed at 1 to k.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = GroupedPrecisionAtK(torch.tensor([0, 0, 1, 1]), k=2)
    >>> metric.update(torch.tensor([[0, 3], [1, 2]]), SparseLabels.from_lists([[0, 3], [2]]))
    >>> metric.compute().tolist()
    [[0.5, 0.25], [0.0, 0.5]]
    """

    hits: Tensor
    num_rows: Tensor

    def __init__(self, groups: Tensor, k: int = 5) -> None:
        super().__init__(k)
        if not isinstance(groups, Tensor) or groups.dtype not in (torch.int32, torch.int64):
            raise TypeError("groups must be an int32 or int64 tensor")
        if groups.dim() != 1 or (groups.numel() and int(groups.min()) < 0):
            raise ValueError("groups must have shape [num_labels] and no negative number")
        self.groups = groups.to(torch.int64)
        self.num_groups = int(groups.max()) + 1 if groups.numel() else 0
        self._add_state("hits", (self.num_groups, k), torch.int64)
        self._add_state("num_rows", (), torch.int64)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "groups": self.groups}

    def _add(self, ranking: _Ranking) -> None:
        self.groups = self.groups.to(ranking.hits.device)
        _check_labels(ranking.labels[ranking.hits], len(self.groups), "predicted")
        ranks = torch.arange(self.k, device=self.groups.device).expand_as(ranking.hits)
        places = self.groups[ranking.labels[ranking.hits]] * self.k + ranks[ranking.hits]
        self.hits += torch.bincount(places, minlength=self.hits.numel()).view_as(self.hits)
        self.num_rows += len(ranking.hits)

    def compute(self) -> Tensor:
        """Return the values at 1 to k, in [0, 1]: float64 ``[groups, k]``, NaN before any row."""
        ranks = torch.arange(1, self.k + 1, dtype=torch.float64, device=self.hits.device)
        return self.hits.cumsum(1) / (ranks * self.num_rows)


def frequency_groups(counts: Tensor, num_groups: int = 3) -> Tensor:
    """Return the group of each label by frequency, so that groups have equally many occurrences.

    With three groups: head (0), torso (1) and tail (2), each with a third of all occurrences, the
    tail with most of the labels.

    Args:
        counts: ``[num_labels]``, in how many training rows each label is.
        num_groups: at least 1.

    Returns:
        int64 ``[num_labels]``. Labels that never occur are in the last group.

    >>> import torch
    >>> frequency_groups(torch.tensor([1, 60, 30, 20, 0, 9]), 3).tolist()
    [2, 0, 1, 2, 2, 2]
    """
    arguments.integer(num_groups, "num_groups", 1)
    if counts.dim() != 1:
        raise ValueError(f"counts must have shape [num_labels], got {list(counts.shape)}")
    counts = counts.to(torch.float64)
    order = counts.argsort(descending=True, stable=True)
    sorted_counts = counts[order]
    # By where the middle of a label's occurrences lies among all.
    middles = sorted_counts.cumsum(0) - sorted_counts / 2
    whole = sorted_counts.sum().clamp(min=torch.finfo(torch.float64).tiny)
    groups = (middles / whole * num_groups).long().clamp(max=num_groups - 1)
    groups[sorted_counts == 0] = num_groups - 1
    return torch.empty_like(groups).scatter(0, order, groups)


class CoverageAtK(AtK):
    """Coverage@1 to coverage@k: the share of labels that are right in some row's first 1 to k.

    Args:
        num_labels: C.
        k: the metric is computed at 1 to k.
        labels: which labels the share is of: ``'present'``, those that some row has, or ``'all'``.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = CoverageAtK(10, k=2)
    >>> metric.update(torch.tensor([[4, 1], [4, 9]]), SparseLabels.from_lists([[4], [4, 9, 0]]))
    >>> metric.compute()
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """

    best_rank: Tensor
    present: Tensor

    def __init__(self, num_labels: int, k: int = 5, *, labels: str = "present") -> None:
        super().__init__(k)
        self.num_labels = arguments.integer(num_labels, "num_labels", 0)
        arguments.one_of(labels, "labels", LABELS)
        self.labels = labels
        # The best rank at which a label was right, from 0; k if at none.
        self._add_state("best_rank", (num_labels,), torch.int32, initial=k, reduction="min")
        self._add_state("present", (num_labels,), torch.int8, reduction="max")

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "num_labels": self.num_labels, "labels": self.labels}

    def _add(self, ranking: _Ranking) -> None:
        _, labels = ranking.true.rows_and_labels()
        _check_labels(labels, self.num_labels, "target")
        ranks = torch.arange(self.k, dtype=torch.int32, device=labels.device)
        right = ranking.hits
        self.best_rank.scatter_reduce_(
            0, ranking.labels[right], ranks.expand_as(right)[right], "amin"
        )
        self.present[labels] = 1

    def compute(self) -> Tensor:
        """Return the values at 1 to k, in [0, 1]: float64 ``[k]``, NaN before the first label."""
        ranks = torch.arange(1, self.k + 1, device=self.best_rank.device)
        covered = torch.bincount(self.best_rank, minlength=self.k + 1).cumsum(0)[ranks - 1]
        whole = self.present.sum() if self.labels == "present" else self.num_labels
        return covered.to(torch.float64) / whole


class MacroF1AtK(AtK):
    """Macro-F1@k: the mean over labels of their F1, if the k best labels of each row are predicted.

    Schultheis et al., "Generalized test utilities for long-tail performance in extreme multi-label
    classification", NeurIPS 2023.

    Args:
        num_labels: C.
        k: how many labels are predicted for each row.
        labels: which labels the mean is over: ``'all'``, where those that are neither predicted nor
            true have F1 = 0, or ``'present'``, those that some row has.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = MacroF1AtK(10, k=1, labels="present")
    >>> metric.update(torch.tensor([[4], [9]]), SparseLabels.from_lists([[4], [4]]))
    >>> round(metric.compute().item(), 4)
    0.6667
    """

    correct: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, num_labels: int, k: int = 5, *, labels: str = "all") -> None:
        super().__init__(k)
        self.num_labels = arguments.integer(num_labels, "num_labels", 0)
        arguments.one_of(labels, "labels", LABELS)
        self.labels = labels
        for name in ("correct", "predicted", "actual"):
            self._add_state(name, (num_labels,), torch.int64)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "num_labels": self.num_labels, "labels": self.labels}

    def _add(self, ranking: _Ranking) -> None:
        _, labels = ranking.true.rows_and_labels()
        _check_labels(labels, self.num_labels, "target")
        _check_labels(ranking.labels, self.num_labels, "predicted")
        for state, ids in (
            (self.correct, ranking.labels[ranking.hits]),
            (self.predicted, ranking.labels[ranking.labels >= 0]),
            (self.actual, labels),
        ):
            state.scatter_add_(0, ids, torch.ones_like(ids))

    def compute(self) -> Tensor:
        """Return the value in [0, 1]: float64, 0-d, NaN before the first label."""
        of_labels = 2 * self.correct / (self.predicted + self.actual).clamp(min=1).double()
        if self.labels == "present":
            return of_labels.sum() / (self.actual > 0).sum()
        return of_labels.mean()


def labels_of_pairs(pairs: Tensor, num_rows: int) -> SparseLabels:
    """Return pairs of row and label as labels of rows, for ``exclude=``.

    Args:
        pairs: int64 ``[P, 2]``: row and label, in any order.
        num_rows: N.

    Raises:
        TypeError, ValueError: wrong dtype or shape; a row out of range.

    >>> import torch
    >>> labels_of_pairs(torch.tensor([[2, 7], [0, 1], [2, 3]]), 3).offsets.tolist()
    [0, 1, 1, 3]
    """
    arguments.integer(num_rows, "num_rows", 0)
    if pairs.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"pairs must be int32 or int64, got {pairs.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [P, 2], got {list(pairs.shape)}")
    rows = pairs[:, 0].to(torch.int64)
    may_look = contents_may_be_checked(rows) and rows.numel() > 0
    if may_look and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise ValueError(f"pairs must have rows from 0 to {num_rows - 1}")
    rows, order = rows.sort(stable=True)
    steps = torch.arange(num_rows + 1, device=rows.device)
    return SparseLabels(pairs[:, 1].to(torch.int64)[order], torch.searchsorted(rows, steps))


def _ranked(
    predicted: Tensor,
    target: LabelsLike,
    mask: LabelsLike | None,
    exclude: LabelsLike | None,
    k: int,
) -> _Ranking:
    if not isinstance(predicted, Tensor):
        raise TypeError(f"predicted must be a tensor, got {type(predicted).__name__}")
    if predicted.dim() != 2:
        raise ValueError(f"predicted must have two dimensions, got {list(predicted.shape)}")
    if predicted.dtype == torch.bool or predicted.is_complex():
        raise TypeError(f"predicted must be label ids or scores, got {predicted.dtype}")
    has_scores = predicted.is_floating_point()
    known = predicted.shape[1] if has_scores else num_labels_of(target)
    for labels in (mask, exclude):
        known = num_labels_of(labels) if known is None else known
    rows = len(predicted)
    if isinstance(target, SparseLabels) and target.num_rows != rows:
        raise ValueError(f"predicted has {rows} rows, target has {target.num_rows}")
    input = stand_in((rows,), UNKNOWN if known is None else known, predicted)
    true, observed = true_elements(target, input, mask, None)
    excluded = selected_elements(exclude, input, "exclude")
    true = true.without(excluded)
    if has_scores:
        scores = predicted.detach()
        if observed is not None:
            allowed = observed.dense
            if allowed is None:
                allowed = torch.zeros_like(scores, dtype=torch.bool)
                allowed[observed.rows_and_labels()] = True
            scores = scores.masked_fill(~allowed, -torch.inf)
        if excluded is not None:
            scores = scores.index_put(excluded.rows_and_labels(), scores.new_tensor(-torch.inf))
        width = min(k, scores.shape[1])
        ranked = predicted.new_zeros((rows, 0), dtype=torch.int64)
        if width:
            ranked = topk.top_labels(scores, width)[1]
    else:
        ranked = predicted.to(torch.int64)
    every_row = torch.arange(rows, device=ranked.device)[:, None].expand_as(ranked)
    removed = torch.zeros_like(ranked, dtype=torch.bool)
    if observed is not None:
        removed |= ~observed.contains(every_row, ranked) & (ranked >= 0)
    if excluded is not None:
        removed |= excluded.contains(every_row, ranked)
    if observed is not None or excluded is not None:
        places = removed.to(torch.uint8).argsort(dim=1, stable=True)
        ranked = torch.where(removed, -1, ranked).gather(1, places)
    ranked = torch.nn.functional.pad(ranked[:, :k], (0, max(k - ranked.shape[1], 0)), value=-1)
    every_row = torch.arange(rows, device=ranked.device)[:, None].expand_as(ranked)
    ranked = torch.where(_repeated(ranked), -1, ranked)
    return _Ranking(ranked, true.contains(every_row, ranked), true, true.per_row())


def _repeated(ranked: Tensor) -> Tensor:
    """Which ids an earlier rank has, bool [N, k]."""
    ids, places = ranked.sort(dim=1, stable=True)
    same = torch.zeros_like(ids, dtype=torch.bool)
    same[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return torch.zeros_like(same).scatter(1, places, same)


def _so_far(hits: Tensor) -> Tensor:
    return hits.to(torch.float64).cumsum(1)


def _ranks(ranking: _Ranking) -> Tensor:
    """1 to k, float64."""
    hits = ranking.hits
    return torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)


def _discounted(gains: Tensor) -> Tensor:
    ranks = torch.arange(2, gains.shape[1] + 2, dtype=torch.float64, device=gains.device)
    return (gains / torch.log2(ranks)).cumsum(1)


def _largest_gain(ranking: _Ranking) -> Tensor:
    """Of rows with as many labels, at each rank: float64 [N, k]; 1 for rows without any."""
    ranks = _ranks(ranking)
    largest = torch.cumsum(1 / torch.log2(ranks + 1), 0)
    places = torch.minimum(ranking.num_true[:, None], ranks.to(torch.int64)).clamp(min=1) - 1
    return largest[places]


def _check_labels(labels: Tensor, num_labels: int, name: str) -> None:
    if contents_may_be_checked(labels) and labels.numel() and int(labels.max()) >= num_labels:
        raise ValueError(
            f"{name} has label {int(labels.max())}, the metric is for {num_labels} labels"
        )
