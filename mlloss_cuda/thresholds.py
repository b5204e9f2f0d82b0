"""Thresholds of labels: fitted to histograms of scores, applied to scores.

A score above the threshold of its label is a positive decision. What serves a loss or a ranking
need not serve decisions: with few positives the best threshold for F1 is far below a probability of
0.5 (Lipton, Elkan and Narayanaswamy, "Thresholding classifiers to maximize F1 score",
arXiv:1402.1892), and it differs from label to label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import arguments, linear
from .metrics.elements import Elements, true_elements
from .metrics.streaming import Accumulator
from .targets import LabelsLike, SparseLabels, rows_and_labels, stand_in

# Elements of a block of scores: what temporaries of the histogram are made for.
_BLOCK = 1 << 22


class ScoreHistogram(Accumulator):
    """How many observed elements, and how many positives, of each label have a score in each bin.

    Made of held-out rows, batch by batch; thresholds are fitted to it. It takes 16 bytes per label
    and bin.

    Args:
        num_labels: C.
        bins: number of bins; thresholds lie between two of them.
        low: scores up to here are all in the first bin.
        high: scores above are all in the last one. The defaults are for logits.

    >>> import torch
    >>> histogram = ScoreHistogram(2, bins=4, low=-2.0, high=2.0)
    >>> histogram.update(torch.tensor([[1.5, -3.0], [0.5, 0.5]]), torch.tensor([[1, 0], [0, 0]]))
    >>> histogram.positives.tolist(), histogram.elements.tolist()
    ([[0, 0, 0, 1], [0, 0, 0, 0]], [[0, 0, 1, 1], [1, 0, 1, 0]])
    """

    positives: Tensor  # int64 [C, bins]
    elements: Tensor  # int64 [C, bins]

    def __init__(
        self, num_labels: int, *, bins: int = 64, low: float = -8.0, high: float = 8.0
    ) -> None:
        super().__init__()
        self.num_labels = arguments.integer(num_labels, "num_labels", 0)
        self.bins = arguments.integer(bins, "bins", 2)
        self.low = arguments.finite_number(low, "low")
        self.high = arguments.finite_number(high, "high")
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        for name in ("positives", "elements"):
            self._add_state(name, (num_labels, bins), torch.int64)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_labels", "bins", "low", "high")}

    def edges(self) -> Tensor:
        """Return the candidates for thresholds: float32 ``[bins - 1]``, rising.

        Bin i has the scores above edge i - 1 and up to edge i.
        """
        width = (self.high - self.low) / self.bins
        places = torch.arange(1, self.bins, dtype=torch.float64, device=self.elements.device)
        return (self.low + width * places).to(torch.float32)

    def update(
        self,
        scores: Tensor,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        ignore_index: float | None = None,
    ) -> None:
        """Add a batch.

        Args:
            scores: floating ``[..., C]``. NaN counts as the lowest score.
            target: of the same shape, in any format of the losses, without soft values.
            mask: the observed elements; None is all.
            ignore_index: elements of a dense target with this value are not observed.

        Raises:
            TypeError, ValueError: types, shapes, devices or contents that do not fit.
        """
        arguments.check_input(scores, "scores", "scores")
        self._check_num_labels(scores.shape[-1])
        ignore_index = arguments.ignored_value(ignore_index)
        true, observed = true_elements(target, scores, mask, ignore_index)
        self.to(scores.device)
        parts = _Parts(true, observed)
        rows = rows_and_labels(scores.detach())
        width = max(_BLOCK // max(len(rows), 1), 1)
        for begin in range(0, self.num_labels, width):
            end = min(begin + width, self.num_labels)
            self._add(rows[:, begin:end], begin, end, parts)

    def update_linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: LabelsLike,
        *,
        mask: LabelsLike | None = None,
        ignore_index: float | None = None,
        chunk: int | None = None,
    ) -> None:
        """Add a batch of the logits ``hidden @ weight.T + bias``, which are never all there.

        Args:
            hidden: ``[..., d]``, floating.
            weight: ``[C, d]``.
            bias: ``[C]`` or None.
            target: as in :meth:`update`, for logits ``[..., C]``.
            mask: as in :meth:`update`.
            ignore_index: as in :meth:`update`.
            chunk: as in :func:`mlloss_cuda.linear_sigmoid_cross_entropy`.

        Raises:
            TypeError, ValueError: types, shapes, devices or contents that do not fit.
        """
        linear.check_hidden(hidden)
        layer = linear.as_layer(hidden.detach(), weight, bias, chunk)
        self._check_num_labels(weight.shape[0])
        input = stand_in(hidden.shape[:-1], self.num_labels, hidden)
        ignore_index = arguments.ignored_value(ignore_index)
        true, observed = true_elements(target, input, mask, ignore_index)
        self.to(hidden.device)
        parts = _Parts(true, observed)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for _, begin, end, logits in layer.logits():
                self._add(logits, begin, end, parts)

    def _check_num_labels(self, found: int) -> None:
        if found != self.num_labels:
            raise ValueError(
                f"the scores are of {found} labels, the histogram is for {self.num_labels}"
            )

    def _bin_of(self, scores: Tensor) -> Tensor:
        if scores.dtype != torch.float64:
            scores = scores.float()
        edges = self.edges().to(scores.dtype)
        bins = torch.bucketize(scores.contiguous(), edges)
        return torch.where(scores.isnan(), 0, bins)

    def _add(self, scores: Tensor, begin: int, end: int, parts: _Parts) -> None:
        """Add the scores of the labels [begin, end)."""
        bins = self._bin_of(scores)
        labels = torch.arange(end - begin, device=bins.device)
        keys = bins + labels * self.bins
        of_part = self.elements[begin:end].view(-1)
        observed = parts.observed(begin, end)
        used = keys.reshape(-1) if observed is None else keys[observed]
        of_part += torch.bincount(used, minlength=len(of_part))
        rows, labels = parts.true(begin, end)
        found = keys[rows, labels - begin]
        self.positives[begin:end].view(-1).scatter_add_(0, found, torch.ones_like(found))


class _Parts:
    """True and observed elements, of some labels at a time."""

    def __init__(self, true: Elements, observed: Elements | None) -> None:
        self._true = _by_label(true)
        self._dense = None if observed is None else observed.dense
        self._listed = None
        if observed is not None and observed.dense is None:
            self._listed = _by_label(observed)

    def true(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows and labels."""
        return _between(self._true, begin, end)

    def observed(self, begin: int, end: int) -> Tensor | tuple[Tensor, Tensor] | None:
        """What picks the observed elements out of a matrix of the labels [begin, end)."""
        if self._listed is not None:
            rows, labels = _between(self._listed, begin, end)
            return rows, labels - begin
        return None if self._dense is None else self._dense[:, begin:end]


def _by_label(elements: Elements) -> tuple[Tensor, Tensor]:
    rows, labels = elements.rows_and_labels()
    labels, order = labels.sort(stable=True)
    return rows[order], labels


def _between(elements: tuple[Tensor, Tensor], begin: int, end: int) -> tuple[Tensor, Tensor]:
    rows, labels = elements
    bounds = torch.tensor([begin, end], device=labels.device)
    first, last = torch.searchsorted(labels, bounds).tolist()
    return rows[first:last], labels[first:last]


def fit_f1(histogram: ScoreHistogram, *, shrinkage: float = 8.0) -> Tensor:
    """Return the threshold of each label that gives the largest F1 on the rows of a histogram.

    Among thresholds that give the same, the middle one. The few positives of a rare label say
    little about where others will be: `shrinkage` adds so many, spread as the positives of all
    labels are.

    Args:
        histogram: of held-out rows.
        shrinkage: how many positives are added to each label, at least 0. With 0, labels without
            positives have the threshold inf, and are never predicted.

    Returns:
        float32 ``[C]``.

    Raises:
        ValueError: shrinkage is negative or not finite.

    >>> import torch
    >>> histogram = ScoreHistogram(1, bins=8, low=-4.0, high=4.0)
    >>> scores = torch.tensor([[2.5], [1.5], [-1.5], [-2.5]])
    >>> histogram.update(scores, torch.tensor([[1], [1], [1], [0]]))
    >>> fit_f1(histogram, shrinkage=0.0)
    tensor([-2.])
    """
    shrinkage = arguments.nonnegative_number(shrinkage, "shrinkage")
    return torch.cat(
        [_best_f1(*counts, histogram.edges()) for counts in _above_edges(histogram, shrinkage)]
    )


def _best_f1(correct: Tensor, predicted: Tensor, actual: Tensor, edges: Tensor) -> Tensor:
    f1 = 2 * correct / (predicted + actual).clamp(min=torch.finfo(torch.float64).tiny)
    best, first = f1.max(dim=1, keepdim=True)
    # The run of equal values that begins at the first largest one.
    places = torch.arange(f1.shape[1], device=f1.device)
    ends = (f1 != best) & (places > first)
    last = torch.where(ends, places, f1.shape[1]).amin(dim=1, keepdim=True) - 1
    chosen = edges[(first + (last - first) // 2).squeeze(1)]
    return torch.where(best.squeeze(1) > 0, chosen, torch.inf)


def fit_precision(histogram: ScoreHistogram, precision: float, *, shrinkage: float = 8.0) -> Tensor:
    """Return the lowest threshold of each label with at least a given precision.

    Args:
        histogram: of held-out rows.
        precision: the share of positive decisions that are to be right, in (0, 1].
        shrinkage: as in :func:`fit_f1`.

    Returns:
        float32 ``[C]``; inf, which predicts nothing, where no threshold has that precision.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch
    >>> histogram = ScoreHistogram(1, bins=8, low=-4.0, high=4.0)
    >>> histogram.update(torch.tensor([[2.5], [1.5], [0.5]]), torch.tensor([[1], [1], [0]]))
    >>> fit_precision(histogram, 0.9, shrinkage=0.0)
    tensor([1.])
    """
    precision = arguments.number_between(precision, "precision", 0.0, 1.0)
    if precision == 0:
        raise ValueError("precision must be above 0")
    shrinkage = arguments.nonnegative_number(shrinkage, "shrinkage")
    edges = histogram.edges()
    found = []
    for correct, predicted, _ in _above_edges(histogram, shrinkage):
        reached = (correct >= precision * predicted) & (predicted > 0)
        first = reached.to(torch.uint8).argmax(dim=1)
        found.append(torch.where(reached.any(dim=1), edges[first], torch.inf))
    return torch.cat(found)


def _above_edges(
    histogram: ScoreHistogram, shrinkage: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For some labels after the others: what is above each edge, correct and predicted, fp64
    [labels, edges], and positives, fp64 [labels, 1]; with the positives that are added.
    """
    added: Tensor | float = 0.0
    of_all = histogram.positives.sum(0).flip(0).cumsum(0).flip(0).to(torch.float64)
    if shrinkage and of_all[0] > 0:
        added = shrinkage * of_all / of_all[0]
    width = max(_BLOCK // histogram.bins, 1)
    for begin in range(0, max(histogram.num_labels, 1), width):
        positives, elements = (
            counts[begin : begin + width].flip(1).cumsum(1).flip(1).to(torch.float64) + added
            for counts in (histogram.positives, histogram.elements)
        )
        yield positives[:, 1:], elements[:, 1:], positives[:, :1]


class LabelThresholds(torch.nn.Module):
    """The thresholds of labels as a part of a model: saved, loaded and moved with it.

    Args:
        values: floating ``[C]``, as :func:`fit_f1` and :func:`fit_precision` return them.

    Attributes:
        values: buffer, ``[C]``.

    >>> import torch
    >>> thresholds = LabelThresholds(torch.tensor([0.5, -1.0]))
    >>> thresholds(torch.tensor([[0.4, -0.5]])).tolist()
    [[False, True]]
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        arguments.check_input(values, "values", "thresholds")
        if values.dim() != 1:
            raise ValueError(f"values must have shape [num_labels], got {list(values.shape)}")
        self.register_buffer("values", values.detach().clone())

    def forward(self, scores: Tensor) -> Tensor:
        """Return the decisions for scores ``[..., C]``: bool, of the same shape.

        Raises:
            TypeError, ValueError: scores are not floating, or of another number of labels.
        """
        arguments.check_input(scores, "scores", "scores")
        if scores.shape[-1] != self.values.shape[0]:
            raise ValueError(
                f"scores must have {self.values.shape[0]} labels, got {scores.shape[-1]}"
            )
        return scores > self.values

    def labels(self, scores: Tensor) -> SparseLabels:
        """Return the labels decided on, for scores ``[..., C]``.

        Raises:
            TypeError, ValueError: as in :meth:`forward`.
        """
        rows, labels = rows_and_labels(self(scores)).nonzero(as_tuple=True)
        return _as_labels(rows, labels, scores)

    def linear_labels(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chunk: int | None = None
    ) -> SparseLabels:
        """Return the labels decided on by the logits ``hidden @ weight.T + bias``, in parts.

        Args:
            hidden: ``[..., d]``, floating.
            weight: ``[C, d]``.
            bias: ``[C]`` or None.
            chunk: as in :func:`mlloss_cuda.linear_sigmoid_cross_entropy`.

        Raises:
            TypeError, ValueError: types, shapes or devices that do not fit.
        """
        linear.check_hidden(hidden)
        layer = linear.as_layer(hidden.detach(), weight, bias, chunk)
        if weight.shape[0] != self.values.shape[0]:
            raise ValueError(f"weight must have {self.values.shape[0]} rows, got {weight.shape[0]}")
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            for _, begin, end, logits in layer.logits():
                rows, labels = (logits > self.values[begin:end]).nonzero(as_tuple=True)
                found.append((rows, labels + begin))
        rows, order = torch.cat([rows for rows, _ in found]).sort(stable=True)
        return _as_labels(rows, torch.cat([labels for _, labels in found])[order], hidden)


def _as_labels(rows: Tensor, labels: Tensor, of: Tensor) -> SparseLabels:
    """From rows, which rise, and labels; `of` has the leading dimensions."""
    steps = torch.arange(of.shape[:-1].numel() + 1, device=rows.device)
    return SparseLabels(labels, torch.searchsorted(rows, steps))
