"""Ranking metrics of extreme multi-label classification, fed batch by batch.

The state of a metric is k sums and a count, whatever the number of rows and labels; two metrics
that saw different rows can be merged. Definitions and the treatment of odd cases are those of
pyxclib (kunaldahiya/pyxclib, `xclib.evaluation.xc_metrics`).

**Rows without labels** count as rows on which nothing was right: they add to the number of rows
in P@k, and nothing to either sum of PSP@k. A data set in which a share s of the rows has no label
therefore cannot reach a P@1 above 1 - s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import SparseLabels


def inverse_propensity(counts: Tensor, num_samples: int, A: float = 0.55, B: float = 1.5) -> Tensor:
    """How much a correct label is worth in PSP@k: more, the rarer it is.

    1 + C (n + B)^-A with C = (ln N - 1) (B + 1)^A, from Jain, Prabhu and Varma, "Extreme
    multi-label loss functions", KDD 2016, equation 2.

    Args:
        counts: [num_labels], how many training rows have each label.
        num_samples: number N of training rows, at least 3 (below, C is negative).
        A: constant of the data set; 0.55 serves all but Wikipedia (0.5) and Amazon (0.6).
        B: constant of the data set; 1.5 serves all but Wikipedia (0.4) and Amazon (2.6).

    Returns:
        [num_labels], float64.

    >>> inverse_propensity(torch.tensor([0, 1, 100]), num_samples=1000)
    tensor([8.8242, 6.9078, 1.7704], dtype=torch.float64)
    """
    if num_samples < 3:
        raise ValueError(f"num_samples must be at least 3, got {num_samples}")
    # Tensor arithmetic throughout: math.log and torch.log may differ in the last bit.
    n = counts.to(torch.float64)
    c = (torch.log(n.new_tensor(float(num_samples))) - 1) * (B + 1) ** A
    return 1 + c * (n + B) ** -A


class PrecisionAtK:
    """P@1 to P@k: the share of correct labels among the first 1 to k predicted, mean over rows.

    >>> from mlloss_cuda import SparseLabels
    >>> metric = PrecisionAtK(k=3)
    >>> metric.update(torch.tensor([[4, 1, 7], [2, 0, 5]]), SparseLabels.from_lists([[1, 4], [9]]))
    >>> metric.compute()
    tensor([0.5000, 0.5000, 0.3333], dtype=torch.float64)
    """

    def __init__(self, k: int = 5) -> None:
        self.k = _checked_k(k)
        self.hits = torch.zeros(k, dtype=torch.float64)  # correct labels at each rank
        self.num_rows = 0

    def update(self, predicted: Tensor, target: SparseLabels) -> None:
        """Add a batch.

        Args:
            predicted: integer [N, K]: label ids, best first; or floating point
                [N, num_labels]: scores, of which the k largest are taken. A negative id or a
                missing column (K or num_labels below k) counts as a wrong label.
            target: the labels of the N rows, without values. Negative indices are padding,
                duplicates count once.

        Raises:
            ValueError: shapes that do not fit, or a target with values.
        """
        ranked = _ranked(predicted, target, self.k)
        rows, labels = _unique_entries(target)
        self.hits += _is_hit(ranked, rows, labels).to(torch.float64).sum(0).cpu()
        self.num_rows += len(ranked)

    def merge(self, other: PrecisionAtK) -> None:
        """Add what another metric has seen."""
        if other.k != self.k:
            raise ValueError(f"cannot merge metrics with k = {self.k} and k = {other.k}")
        self.hits += other.hits
        self.num_rows += other.num_rows

    def compute(self) -> Tensor:
        """P@1 to P@k in [0, 1]: float64 [k], NaN before the first row."""
        ranks = torch.arange(1, self.k + 1, dtype=torch.float64)
        return self.hits.cumsum(0) / (ranks * self.num_rows)


class PropensityScoredPrecisionAtK:
    """PSP@1 to PSP@k: precision with each correct label weighted by its inverse propensity.

    The ratio of two sums over all rows: the weights of the correct labels among the first k
    predicted, and the k largest weights among the labels of the row, which is the most that any
    prediction can get.

    >>> from mlloss_cuda import SparseLabels
    >>> metric = PropensityScoredPrecisionAtK(torch.tensor([1.0, 2.0, 5.0]), k=2)
    >>> metric.update(torch.tensor([[0, 1]]), SparseLabels.from_lists([[1, 2]]))
    >>> metric.compute()
    tensor([0.0000, 0.2857], dtype=torch.float64)
    """

    def __init__(self, inverse_propensity: Tensor, k: int = 5) -> None:
        """`inverse_propensity`: [num_labels], see the function of that name."""
        self.k = _checked_k(k)
        self.weights = inverse_propensity.to(torch.float64)
        self.gained = torch.zeros(k, dtype=torch.float64)  # weight of the hits at each rank
        self.attainable = torch.zeros(k, dtype=torch.float64)

    def update(self, predicted: Tensor, target: SparseLabels) -> None:
        """Add a batch; arguments as in `PrecisionAtK.update`."""
        ranked = _ranked(predicted, target, self.k)
        rows, labels = _unique_entries(target)
        weights = self.weights.to(ranked.device)
        hit = _is_hit(ranked, rows, labels)
        self.gained += torch.where(hit, weights[ranked.clamp(min=0)], 0.0).sum(0).cpu()

        # Per row the largest weights first: sort by weight, then stably by row.
        by_weight = torch.argsort(weights[labels], descending=True, stable=True)
        rows, best = torch.sort(rows[by_weight], stable=True)
        sorted_weights = weights[labels[by_weight]][best]
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        counted = rank < self.k
        self.attainable += torch.bincount(
            rank[counted], sorted_weights[counted], minlength=self.k
        ).cpu()

    def merge(self, other: PropensityScoredPrecisionAtK) -> None:
        """Add what another metric, with the same propensities, has seen."""
        if other.k != self.k:
            raise ValueError(f"cannot merge metrics with k = {self.k} and k = {other.k}")
        if not torch.equal(other.weights.cpu(), self.weights.cpu()):
            raise ValueError("cannot merge metrics with different propensities")
        self.gained += other.gained
        self.attainable += other.attainable

    def compute(self) -> Tensor:
        """PSP@1 to PSP@k in [0, 1]: float64 [k], NaN before the first label."""
        return self.gained.cumsum(0) / self.attainable.cumsum(0)


def _checked_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _ranked(predicted: Tensor, target: SparseLabels, k: int) -> Tensor:
    """The k best labels of each row, int64 [N, k], -1 where there are fewer."""
    if predicted.dim() != 2:
        raise ValueError(f"predicted must have two dimensions, got {list(predicted.shape)}")
    if len(predicted) != target.num_rows:
        raise ValueError(f"predicted has {len(predicted)} rows, target has {target.num_rows}")
    if target.values is not None:
        raise ValueError("target.values must be None: these metrics are for hard labels")
    if predicted.is_floating_point():
        ranked = torch.topk(predicted, min(k, predicted.shape[1]), dim=1).indices
    else:
        ranked = predicted[:, :k].to(torch.int64)
    return torch.nn.functional.pad(ranked, (0, k - ranked.shape[1]), value=-1)


def _unique_entries(target: SparseLabels) -> tuple[Tensor, Tensor]:
    """Row and label of each entry that is not padding, ascending and without duplicates."""
    indices = target.indices.to(torch.int64)
    rows = torch.repeat_interleave(
        torch.arange(target.num_rows, device=indices.device), target.offsets.to(torch.int64).diff()
    )
    rows, indices = rows[indices >= 0], indices[indices >= 0]
    stride = _stride(indices)
    keys = torch.unique(rows * stride + indices)  # sorted
    return keys // stride, keys % stride


def _is_hit(ranked: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Which of the ranked labels are labels of their row, bool [N, k]."""
    stride = torch.maximum(_stride(labels), _stride(ranked))
    row = torch.arange(len(ranked), device=ranked.device)[:, None]
    return torch.isin(row * stride + ranked, rows * stride + labels) & (ranked >= 0)


def _stride(labels: Tensor) -> Tensor:
    """A number above every label, so that row * stride + label names a pair."""
    largest = labels.new_zeros(1) if labels.numel() == 0 else labels.max()
    return largest.reshape(()) + 1
