"""Metrics of decisions: which labels each row is said to have.

Formulas and names are scikit-learn's (`f1_score`, `hamming_loss`, `accuracy_score` of indicator
matrices), with elements that are not observed left out of everything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, targets
from ..targets import LabelsLike, PackedLabels, SparseLabels
from .elements import Elements, num_labels_of, selected_elements, true_elements
from .streaming import Metric

AVERAGES = ("micro", "macro", "samples")


class _Batch(NamedTuple):
    """What is observed of N rows."""

    predicted: Elements
    true: Elements
    correct: Elements  # predicted and true
    observed: Elements | None  # None: everything

    def observed_per_row(self) -> Tensor:
        """int64 [N]."""
        if self.observed is not None:
            return self.observed.per_row()
        like = self.predicted
        return torch.full((like.num_rows,), like.num_labels, device=like.device)


class Decisions(Metric):
    """Base of the metrics of decisions.

    Args:
        threshold: scores above it are positive decisions: a number, or floating ``[C]``, as
            :mod:`mlloss_cuda.thresholds` fits them. 0 is for logits, 0.5 for probabilities.
        num_labels: C, needed where label ids are all that is given.
    """

    def __init__(self, *, threshold: Tensor | float = 0.0, num_labels: int | None = None) -> None:
        super().__init__()
        if num_labels is not None:
            arguments.integer(num_labels, "num_labels", 0)
        if isinstance(threshold, Tensor):
            if not threshold.is_floating_point():
                raise TypeError(f"threshold must be floating, got {threshold.dtype}")
            if threshold.dim() != 1 or num_labels not in (None, threshold.shape[0]):
                wanted = "[num_labels]" if num_labels is None else f"[{num_labels}]"
                raise ValueError(
                    f"threshold must be a number or have shape {wanted}, "
                    f"got {list(threshold.shape)}"
                )
            num_labels = threshold.shape[0]
        elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(
                f"threshold must be a number or a tensor, got {type(threshold).__name__}"
            )
        elif threshold != threshold:
            raise ValueError("threshold must be a number, got nan")
        self.threshold, self.num_labels = threshold, num_labels

    def _settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "num_labels": self.num_labels}

    def update(
        self,
        predicted: LabelsLike,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        ignore_index: float | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predicted: floating ``[..., C]``: scores; or decisions: bool ``[..., C]``,
                :class:`mlloss_cuda.PackedLabels`, or :class:`mlloss_cuda.SparseLabels` without
                values. NaN is no positive decision.
            target: of the same shape, in any format of the losses, without soft values.
            mask: the observed elements; None is all.
            ignore_index: elements of a dense target with this value are not observed.

        Raises:
            TypeError, ValueError: types, shapes, devices or contents that do not fit.
        """
        batch = self._batch(predicted, target, mask, ignore_index)
        self.to(batch.predicted.device)
        self._add(batch)

    def _add(self, batch: _Batch) -> None:
        raise NotImplementedError

    def _batch(
        self,
        predicted: LabelsLike,
        target: LabelsLike,
        mask: LabelsLike | None,
        ignore_index: float | None,
    ) -> _Batch:
        ignore_index = arguments.ignored_value(ignore_index)
        input = self._stand_in(predicted, target, mask)
        if isinstance(predicted, Tensor):
            rows = targets.rows_and_labels(predicted.detach())
            threshold = self.threshold
            if predicted.is_floating_point():
                if isinstance(threshold, Tensor):
                    threshold = self.threshold = threshold.to(rows.device)
                rows = rows > threshold
            decided = Elements(rows.shape[0], rows.shape[1], rows, None)
        else:
            found = selected_elements(predicted, input, "predicted")
            assert found is not None
            decided = found
        true, observed = true_elements(target, input, mask, ignore_index)
        decided = decided.intersection(observed)
        return _Batch(decided, true, decided.intersection(true), observed)

    def _stand_in(
        self, predicted: LabelsLike, target: LabelsLike, mask: LabelsLike | None
    ) -> Tensor:
        """What has shape and device of the scores."""
        num_labels = num_labels_of(predicted)
        for other in (target, mask):
            num_labels = num_labels_of(other) if num_labels is None else num_labels
        if num_labels is None:
            num_labels = self.num_labels
        if num_labels is None:
            raise ValueError("num_labels is needed where only label ids are given")
        if self.num_labels not in (None, num_labels):
            raise ValueError(
                f"predicted and target are for {num_labels} labels, the metric is for "
                f"{self.num_labels}"
            )
        if isinstance(predicted, SparseLabels):
            if predicted.values is not None or predicted.observed_only:
                raise ValueError("predicted must be SparseLabels without values")
            return targets.stand_in((predicted.num_rows,), num_labels, predicted.indices)
        if isinstance(predicted, PackedLabels):
            return targets.stand_in(predicted.words.shape[:-1], num_labels, predicted.words)
        if not isinstance(predicted, Tensor):
            raise TypeError(
                "predicted must be a tensor, SparseLabels or PackedLabels, got "
                f"{type(predicted).__name__}"
            )
        if not predicted.is_floating_point() and predicted.dtype != torch.bool:
            raise TypeError(
                f"predicted must be scores (floating) or decisions (bool), got {predicted.dtype}"
            )
        if predicted.dim() == 0:
            raise ValueError("predicted must have shape [..., C], got a 0-d tensor")
        return targets.stand_in(predicted.shape[:-1], num_labels, predicted)


class F1Score(Decisions):
    """F1 = 2 TP / (2 TP + FP + FN), over all elements, over labels, or over rows.

    Args:
        average: ``'micro'``: of the counts of all elements; ``'macro'``: mean of the F1 of each
            label, over all C; ``'samples'``: mean of the F1 of each row of which something is
            observed.
        threshold, num_labels: see :class:`Decisions`; ``'macro'`` needs num_labels.
        zero_division: the F1 of a label or row that has no positive and for which none was
            predicted.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> metric = F1Score("micro")
    >>> metric.update(torch.tensor([[2.0, -1.0, 0.5]]), SparseLabels.from_lists([[0, 1]]))
    >>> metric.compute().item()
    0.5
    """

    correct: Tensor  # of all elements or of labels
    predicted: Tensor
    actual: Tensor
    total: Tensor  # of rows
    num_rows: Tensor

    def __init__(
        self,
        average: str = "micro",
        *,
        threshold: Tensor | float = 0.0,
        num_labels: int | None = None,
        zero_division: float = 0.0,
    ) -> None:
        super().__init__(threshold=threshold, num_labels=num_labels)
        arguments.one_of(average, "average", AVERAGES)
        self.average = average
        self.zero_division = arguments.number_between(zero_division, "zero_division", 0.0, 1.0)
        if average == "samples":
            self._add_state("total", (), torch.float64)
            self._add_state("num_rows", (), torch.int64)
            return
        shape: tuple[int, ...] = ()
        if average == "macro":
            if self.num_labels is None:
                raise ValueError("num_labels is needed for average='macro'")
            shape = (self.num_labels,)
        for name in ("correct", "predicted", "actual"):
            self._add_state(name, shape, torch.int64)

    def _settings(self) -> dict[str, Any]:
        own = {"average": self.average, "zero_division": self.zero_division}
        return {**super()._settings(), **own}

    def _add(self, batch: _Batch) -> None:
        if self.average == "samples":
            self.update_counts(
                batch.correct.per_row(),
                batch.predicted.per_row(),
                batch.true.per_row(),
                batch.observed_per_row(),
            )
            return
        for name, elements in (
            ("correct", batch.correct),
            ("predicted", batch.predicted),
            ("actual", batch.true),
        ):
            counts = elements.per_label() if self.average == "macro" else elements.total()
            getattr(self, name).add_(counts)

    def update_counts(
        self, correct: Tensor, predicted: Tensor, actual: Tensor, observed: Tensor | None = None
    ) -> None:
        """Add rows by their counts: for ``'samples'`` over label shards, which add them up first.

        Args:
            correct: int64 ``[N]``: how many labels of each row are predicted and true.
            predicted: int64 ``[N]``: how many are predicted.
            actual: int64 ``[N]``: how many are true.
            observed: int64 ``[N]``: how many are observed; None if some are in each row.

        Raises:
            ValueError: another average.
        """
        if self.average != "samples":
            raise ValueError(f"counts of rows are for average='samples', not {self.average!r}")
        self.to(correct.device)
        of_rows = _f1(correct, predicted, actual, self.zero_division)
        counted = torch.ones_like(correct, dtype=torch.bool) if observed is None else observed > 0
        self.total += torch.where(counted, of_rows, 0.0).sum()
        self.num_rows += counted.sum()

    def compute(self) -> Tensor:
        """Return the value in [0, 1]: float64, 0-d; NaN for a mean over nothing."""
        if self.average == "samples":
            return self.total / self.num_rows
        return _f1(self.correct, self.predicted, self.actual, self.zero_division).mean()


class HammingLoss(Decisions):
    """The share of observed elements that are decided wrong. Arguments: see :class:`Decisions`.

    >>> import torch
    >>> metric = HammingLoss(threshold=0.5)
    >>> metric.update(torch.tensor([[0.9, 0.2, 0.7, 0.1]]), torch.tensor([[1, 1, 0, 0]]))
    >>> metric.compute().item()
    0.5
    """

    wrong: Tensor
    observed: Tensor

    def __init__(self, *, threshold: Tensor | float = 0.0, num_labels: int | None = None) -> None:
        super().__init__(threshold=threshold, num_labels=num_labels)
        for name in ("wrong", "observed"):
            self._add_state(name, (), torch.int64)

    def _add(self, batch: _Batch) -> None:
        self.wrong += _wrong(batch).sum()
        self.observed += batch.observed_per_row().sum()

    def compute(self) -> Tensor:
        """Return the value in [0, 1]: float64, 0-d, NaN if nothing was observed."""
        return self.wrong.double() / self.observed


class SubsetAccuracy(Decisions):
    """The share of rows in which every observed element is decided right.

    Rows of which nothing is observed do not count. Arguments: see :class:`Decisions`.

    >>> import torch
    >>> metric = SubsetAccuracy(threshold=0.5)
    >>> metric.update(torch.tensor([[0.9, 0.2], [0.9, 0.6]]), torch.tensor([[1, 0], [1, 0]]))
    >>> metric.compute().item()
    0.5
    """

    right: Tensor
    num_rows: Tensor

    def __init__(self, *, threshold: Tensor | float = 0.0, num_labels: int | None = None) -> None:
        super().__init__(threshold=threshold, num_labels=num_labels)
        for name in ("right", "num_rows"):
            self._add_state(name, (), torch.int64)

    def _add(self, batch: _Batch) -> None:
        self.update_counts(_wrong(batch), batch.observed_per_row())

    def update_counts(self, wrong: Tensor, observed: Tensor | None = None) -> None:
        """Add rows by their counts: for label shards, which add them up first.

        Args:
            wrong: int64 ``[N]``: how many labels of each row are decided wrong.
            observed: int64 ``[N]``: how many are observed; None if some are in each row.
        """
        self.to(wrong.device)
        counted = torch.ones_like(wrong, dtype=torch.bool) if observed is None else observed > 0
        self.right += (counted & (wrong == 0)).sum()
        self.num_rows += counted.sum()

    def compute(self) -> Tensor:
        """Return the value in [0, 1]: float64, 0-d, NaN before the first row."""
        return self.right.double() / self.num_rows


def _wrong(batch: _Batch) -> Tensor:
    """Wrong decisions per row."""
    return batch.predicted.per_row() + batch.true.per_row() - 2 * batch.correct.per_row()


def _f1(correct: Tensor, predicted: Tensor, actual: Tensor, zero_division: float) -> Tensor:
    decided = (predicted + actual).double()
    return torch.where(decided == 0, zero_division, 2 * correct / decided)
