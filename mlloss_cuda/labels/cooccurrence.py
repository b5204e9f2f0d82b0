"""Which labels occur together: counts, fed batch by batch, and statistics from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..targets import INDEX_DTYPES, LabelsLike, check_strided
from .entries import LabelRows
from .pair_counts import DensePairs, SparsePairs, count_pairs

# Pairs of labels have int64 keys below C^2.
_LARGEST_NUM_LABELS = math.isqrt(torch.iinfo(torch.int64).max)


class Cooccurrence:
    """How often labels occur together, counted exactly, batch by batch.

    Fed with the targets of a data set (Y, ``[N, C]``), it holds Y^T Y: for each pair of labels, the
    number of rows on which both are positive, on the diagonal the number of rows with the label.
    Counts are int64; the order of rows, how they are cut into batches, and the order in which parts
    are merged make no difference.

    **Missing labels.** On a row with a mask (or ``observed_only`` labels, or ``ignore_index``) what
    is not observed is neither positive nor negative. For each pair, the rows on which both labels
    are observed are counted too, and of these the ones on which the first, and the second, is
    positive. All statistics are estimates from the rows on which both labels of the pair are
    observed. Without missing labels, nothing is kept but Y^T Y and N.

    **Dense and sparse form.** Up to ``dense_up_to`` labels there is a number for each of the C^2
    pairs: 8 bytes, or 32 once there are missing labels. Above, only pairs that occur are kept,
    those on the diagonal included, at 16 bytes (missing labels: 32 bytes more for each pair that is
    observed together), and for a moment, when new ones are sorted in, about 100. Matrices are
    coalesced ``torch.sparse_coo`` tensors. No ``[C, C]`` matrix is made then, and no ``[N, C]`` one
    from labels that are not dense. A row with k labels takes k (k + 1) / 2 steps and may add as
    many pairs.

    In the sparse form, missing labels are supported where the observed ones are listed: as target
    ``SparseLabels`` with ``observed_only=True``, or as mask ``SparseLabels``. A row with k observed
    labels takes k (k + 1) / 2 steps. Other masks raise: nearly everything is observed there, C^2
    pairs on each row.

    Args:
        num_labels: C, at least 0, at most 3,037,000,499.
        dense_up_to: the largest number of labels for the dense form.
        device: where the counts are kept, and labels are expected; torch's default if None.

    Attributes:
        num_labels: C.
        num_rows: N, the rows seen.
        masked_rows: how many of them came with missing labels, or could have.
        is_sparse: which form it has.
        device: where the counts are.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> from mlloss_cuda import SparseLabels
    >>> from mlloss_cuda.labels import Cooccurrence
    >>> seen = Cooccurrence(4)
    >>> seen.update(SparseLabels.from_lists([[0, 1], [1, 2]]))
    >>> seen.update(torch.tensor([[1, 1, 0, 0]]))
    >>> seen.matrix().tolist()
    [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    >>> seen.conditional_probability()[1].tolist()  # of each label, where label 1 is
    [0.6666666666666666, 1.0, 0.3333333333333333, 0.0]
    """

    def __init__(
        self,
        num_labels: int,
        *,
        dense_up_to: int = 4096,
        device: torch.device | str | None = None,
    ) -> None:
        arguments.integer(num_labels, "num_labels", 0)
        arguments.integer(dense_up_to, "dense_up_to", 0)
        if num_labels > _LARGEST_NUM_LABELS:
            raise ValueError(f"num_labels must be at most {_LARGEST_NUM_LABELS}, got {num_labels}")
        self.num_labels, self.num_rows, self.masked_rows = num_labels, 0, 0
        self.is_sparse = num_labels > dense_up_to
        # With the index that torch gives to the current device of a kind.
        self.device = torch.empty(0, device=device).device
        self._positive = self._new_pairs(1)
        self._observed: DensePairs | SparsePairs | None = None

    def __repr__(self) -> str:
        form = "sparse" if self.is_sparse else "dense"
        return (
            f"Cooccurrence(num_labels={self.num_labels}, num_rows={self.num_rows}, "
            f"masked_rows={self.masked_rows}, {form}, device={self.device})"
        )

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor,
        num_rows: int,
        *,
        dense_up_to: int = 4096,
    ) -> Cooccurrence:
        """Take over counts: what :meth:`matrix` returned, or someone else has counted.

        Args:
            matrix: Y^T Y, ``[C, C]``, int64 or int32, dense or ``torch.sparse_coo``.
            num_rows: N.
            dense_up_to: see the class.

        Returns:
            The counts, where ``matrix`` is, without missing labels.

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: no square matrix, or no counts of N rows: negative, not symmetric, more of
                a pair than of one of its labels, or more of a label than rows.

        >>> counts = torch.tensor([[3, 1], [1, 2]])
        >>> Cooccurrence.from_matrix(counts, num_rows=4).jaccard()[0].tolist()
        [1.0, 0.25]
        """
        if not isinstance(matrix, Tensor) or matrix.dtype not in INDEX_DTYPES:
            got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"matrix must be an int64 or int32 tensor, got {got}")
        if matrix.layout != torch.sparse_coo:
            check_strided(matrix, "matrix")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must have shape [C, C], got {list(matrix.shape)}")
        arguments.integer(num_rows, "num_rows", 0)
        found = cls(matrix.shape[0], dense_up_to=dense_up_to, device=matrix.device)
        if matrix.layout == torch.sparse_coo:
            matrix = matrix.coalesce()
            (rows, columns), values = matrix.indices(), matrix.values().long()
        else:
            rows, columns = matrix.nonzero(as_tuple=True)
            values = matrix[rows, columns].long()
        keys, values = rows * found.num_labels + columns, values[None]
        mirrored = SparsePairs(1, found.device)
        mirrored.add(columns * found.num_labels + rows, values)
        on_diagonal = rows == columns
        of_label = values.new_zeros(found.num_labels)
        of_label[rows[on_diagonal]] = values[0, on_diagonal]
        for what, wrong in (
            ("not be negative", values[0] < 0),
            ("be symmetric", mirrored.at(keys)[0] != values[0]),
            ("not exceed those of its labels", values[0] > of_label[rows]),
            (f"not exceed num_rows = {num_rows}", values[0] > num_rows),
        ):
            if bool(wrong.any()):
                place = int(wrong.nonzero()[0])
                pair = int(rows[place]), int(columns[place])
                raise ValueError(
                    f"the counts of a matrix must {what}, got {int(values[0, place])} for the "
                    f"labels {pair}"
                )
        upper = rows <= columns
        found._positive.add(keys[upper], values[:, upper])
        found.num_rows = num_rows
        return found

    # ---- Counting ----

    @torch.no_grad()
    def update(
        self,
        target: LabelsLike,
        mask: LabelsLike | None = None,
        *,
        ignore_index: float | None = None,
    ) -> None:
        """Count a batch.

        Args:
            target: what the losses take for logits ``[..., C]``, in any format, if it is hard: 0 or
                1 wherever it is observed. Padding, order and duplicates of ``SparseLabels`` do not
                matter.
            mask: which labels are observed, as for the losses; None for all.
            ignore_index: the value of dense targets that are missing, such as -1 or nan.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: a wrong shape, device or index; an observed target that is neither 0 nor 1;
                in the sparse form, missing labels whose observed ones are not listed. Nothing of
                the batch is counted then, on any device.

        Two users are known to like, or not to like, some of 10 movies.

        >>> from mlloss_cuda import SparseLabels
        >>> known = SparseLabels.from_lists(
        ...     [[7, 2], [2, 5]], values=[[1, 1], [0, 1]], observed_only=True
        ... )
        >>> seen = Cooccurrence(10)
        >>> seen.update(known)
        >>> seen.conditional_probability()[7, 2].item()  # the one who likes 7 likes 2
        1.0
        """
        rows = LabelRows(target, mask, ignore_index, self.num_labels, self.device)
        if rows.is_masked and self.is_sparse and not rows.lists_observed:
            raise ValueError(
                "mask (or ignore_index) must list the observed labels for more labels than "
                "dense_up_to: give SparseLabels as mask, or as target with observed_only=True"
            )
        rows.check_values()
        if rows.is_masked and self._observed is None:
            self._observed = self._new_pairs(3)
        observed = self._observed if rows.is_masked else None
        for num_rows, entries in rows.blocks():
            count_pairs(entries, num_rows, self.num_labels, self._positive, observed)
        self.num_rows += rows.num_rows
        if rows.is_masked:
            self.masked_rows += rows.num_rows

    @torch.no_grad()
    def merge(self, other: Cooccurrence) -> None:
        """Add what another one, of as many labels and of the same form, has counted.

        Raises:
            TypeError: not a ``Cooccurrence``.
            ValueError: another number of labels, or the other form.
        """
        if not isinstance(other, Cooccurrence):
            raise TypeError(f"other must be a Cooccurrence, got {type(other).__name__}")
        if other.num_labels != self.num_labels or other.is_sparse != self.is_sparse:
            raise ValueError(
                "other must have as many labels and the same form, dense or sparse: "
                f"got {other} for {self}"
            )
        num_rows, masked_rows = other.num_rows, other.masked_rows  # other may be self
        self._positive.merge(other._positive)  # type: ignore[arg-type]
        if other._observed is not None:
            if self._observed is None:
                self._observed = self._new_pairs(3)
            self._observed.merge(other._observed)  # type: ignore[arg-type]
        self.num_rows += num_rows
        self.masked_rows += masked_rows

    def _new_pairs(self, columns: int) -> DensePairs | SparsePairs:
        if self.is_sparse:
            return SparsePairs(columns, self.device)
        return DensePairs(self.num_labels, columns, self.device)

    # ---- Counts ----

    def counts(self) -> Tensor:
        """On how many rows each label is positive: int64 ``[C]``, the diagonal of :meth:`matrix`.

        >>> seen = Cooccurrence(3)
        >>> seen.update(torch.tensor([[1, 1, 0], [0, 1, 0]]))
        >>> seen.counts().tolist()
        [1, 2, 0]
        """
        if isinstance(self._positive, DensePairs):
            return self._positive.counts[0].diagonal().clone()
        counts = torch.zeros(self.num_labels, dtype=torch.int64, device=self.device)
        keys, values = self._positive.table()
        on_diagonal = keys % (self.num_labels + 1) == 0
        counts[keys[on_diagonal] // (self.num_labels + 1)] = values[0, on_diagonal]
        return counts

    def matrix(self) -> Tensor:
        """On how many rows both labels are positive: int64 ``[C, C]``, Y^T Y without a mask."""
        pairs = self._pairs()
        return self._as_matrix(pairs, pairs.both)

    def observed(self) -> Tensor:
        """On how many rows both labels are observed: int64 ``[C, C]``.

        Raises:
            ValueError: in the sparse form, if there are rows without missing labels: all C^2 pairs
                are observed there.
        """
        pairs = self._observed_pairs()
        return self._as_matrix(pairs, pairs.observed)

    def positive_and_observed(self) -> Tensor:
        """On how many rows label i is positive and label j observed: int64 ``[C, C]``.

        Raises:
            ValueError: in the sparse form, as :meth:`observed`.
        """
        pairs = self._observed_pairs()
        return self._as_matrix(pairs, pairs.first)

    # ---- Statistics ----

    def conditional_probability(self) -> Tensor:
        """P(j | i) at [i, j]: of the rows with label i, the share that has label j.

        Of the rows on which both are observed, that is. 0 where that is 0/0.

        Returns:
            fp64 ``[C, C]``.
        """
        pairs = self._pairs()
        return self._where_together(pairs, pairs.both.double() / pairs.first)

    def lift(self) -> Tensor:
        """P(i, j) / (P(i) P(j)): how many times as often as by chance labels occur together.

        1 if they are independent. 0 where that is 0/0, for a label that never occurs or a pair that
        is never observed.

        Returns:
            fp64 ``[C, C]``, symmetric.
        """
        pairs = self._pairs()
        return self._where_together(pairs, _lift(pairs))

    def jaccard(self) -> Tensor:
        """The rows with both labels, as a share of the rows with one of them or both.

        Of the rows on which both are observed. 0 where that is 0/0.

        Returns:
            fp64 ``[C, C]``, symmetric, in [0, 1].
        """
        pairs = self._pairs()
        either = pairs.first + pairs.second - pairs.both
        return self._where_together(pairs, pairs.both.double() / either)

    def pmi(self, *, smoothing: float = 1.0) -> Tensor:
        """Pointwise mutual information: log P(i, j) / (P(i) P(j)), the logarithm of the lift.

        -inf where the labels never occur together, also where the lift is 0/0.

        Args:
            smoothing: see :meth:`ppmi`.

        Returns:
            fp64 ``[C, C]``, in nats.

        Raises:
            TypeError, ValueError: a wrong type or value of ``smoothing``; in the sparse form,
                whose absent pairs are 0 and not -inf. Use :meth:`ppmi` or :meth:`lift`.
        """
        if self.is_sparse:
            raise ValueError(
                "pmi of labels that never occur together is -inf, which a sparse matrix cannot "
                "leave out: use ppmi() or lift()"
            )
        return self._pmi(smoothing)[1]

    def ppmi(self, *, shift: float = 0.0, smoothing: float = 1.0) -> Tensor:
        """Positive pointwise mutual information: max(PMI - shift, 0).

        Source: shift, as log k for k negative samples of word2vec: Levy and Goldberg, "Neural Word
        Embedding as Implicit Matrix Factorization", NIPS 2014. Smoothing: Levy, Goldberg and Dagan,
        "Improving Distributional Similarity with Lessons Learned from Word Embeddings", TACL 2015.

        Args:
            shift: not negative.
            smoothing: in [0, 1], 0.75 in the source. Below 1, the frequency n_j of the second label
                is replaced by n_j^smoothing, scaled so that the sum over labels stays what it was;
                PMI with rare labels becomes smaller, and the matrix is no longer symmetric.

        Returns:
            fp64 ``[C, C]``. Sparse form: what is above 0 is stored.

        Raises:
            TypeError, ValueError: an argument has a wrong type or value.

        >>> seen = Cooccurrence(3)
        >>> seen.update(torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]))
        >>> seen.ppmi()[0].exp().tolist()  # 0 and 1 are together twice as often as by chance
        [2.0, 2.0, 1.0]
        """
        arguments.nonnegative_number(shift, "shift")
        pairs, pmi = self._pmi(smoothing)
        return self._as_matrix(pairs, (pmi - shift).clamp(min=0.0))

    def _pmi(self, smoothing: float) -> tuple[_Pairs, Tensor]:
        arguments.number_between(smoothing, "smoothing", 0.0, 1.0)
        pairs = self._pairs()
        lift = torch.where(pairs.both > 0, _lift(pairs), 0.0)
        if smoothing != 1:
            n = self.counts().double()
            powers = torch.where(n > 0, n**smoothing, 0.0)
            # Of a label that never occurs, there is nothing to smooth.
            factor = torch.where(n > 0, powers / n * (n.sum() / powers.sum()), 1.0)
            lift = lift / (factor if pairs.labels is None else factor[pairs.labels[1]])
        return pairs, lift.log()

    # ---- Pairs of labels, in both forms ----

    def _pairs(self) -> _Pairs:
        """All pairs, or in the sparse form those that are positive together."""
        if isinstance(self._positive, SparsePairs):
            return self._sparse_pairs(self._positive.table()[0])
        both = _mirrored(self._positive.counts[0])
        n = both.diagonal()
        if self._observed is None:
            return _Pairs(None, both, both.new_tensor(self.num_rows), n[:, None], n[None])
        assert isinstance(self._observed, DensePairs)
        observed, first, second = self._observed.counts
        with_missing = torch.triu(first) + torch.triu(second, 1).T
        on_complete_rows = n - with_missing.diagonal()
        observed = _mirrored(observed) + (self.num_rows - self.masked_rows)
        first = with_missing + on_complete_rows[:, None]
        return _Pairs(None, both, observed, first, first.T)

    def _observed_pairs(self) -> _Pairs:
        """All pairs, or in the sparse form those that are observed together."""
        if not self.is_sparse:
            return self._pairs()
        complete = self.num_rows - self.masked_rows
        if complete > 0:
            raise ValueError(
                f"all pairs of labels are observed on {complete} rows without a mask; that is no "
                "sparse matrix"
            )
        observed = self._new_pairs(3) if self._observed is None else self._observed
        assert isinstance(observed, SparsePairs)
        return self._sparse_pairs(observed.table()[0])

    def _sparse_pairs(self, keys: Tensor) -> _Pairs:
        """The pairs of `keys`, and those with their labels exchanged."""
        assert isinstance(self._positive, SparsePairs)
        i, j = keys // max(self.num_labels, 1), keys % max(self.num_labels, 1)
        (both,) = self._positive.at(keys)
        # Where a label is with itself; numbers for all C labels would be too many.
        of_i, of_j = i * (self.num_labels + 1), j * (self.num_labels + 1)
        (first,), (second,) = self._positive.at(of_i), self._positive.at(of_j)
        observed = torch.full_like(both, self.num_rows)
        if self._observed is not None:
            assert isinstance(self._observed, SparsePairs)
            with_missing = self._observed.at(keys)
            # The positives of rows without missing labels, and of the others those that count.
            observed = observed - self.masked_rows + with_missing[0]
            first = first - self._observed.at(of_i)[1] + with_missing[1]
            second = second - self._observed.at(of_j)[1] + with_missing[2]
        other = i != j
        labels = torch.stack([torch.cat([i, j[other]]), torch.cat([j, i[other]])])
        order = torch.argsort(labels[0] * self.num_labels + labels[1])
        return _Pairs(
            labels[:, order],
            torch.cat([both, both[other]])[order],
            torch.cat([observed, observed[other]])[order],
            torch.cat([first, second[other]])[order],
            torch.cat([second, first[other]])[order],
        )

    def _where_together(self, pairs: _Pairs, values: Tensor) -> Tensor:
        """A matrix of `values`, and 0 for pairs that never occur together."""
        return self._as_matrix(pairs, torch.where(pairs.both > 0, values, 0.0))

    def _as_matrix(self, pairs: _Pairs, values: Tensor) -> Tensor:
        """A matrix of `values`; the sparse form stores those that are not 0."""
        shape = self.num_labels, self.num_labels
        if pairs.labels is None:
            return values.expand(shape).clone()
        stored = values != 0
        return torch.sparse_coo_tensor(
            pairs.labels[:, stored],
            values[stored],
            shape,
            is_coalesced=True,
            check_invariants=False,
        )


class _Pairs(NamedTuple):
    """Counts of pairs of labels (i, j).

    In the dense form they broadcast to ``[C, C]``; in the sparse form they are ``[E]``.

    Attributes:
        labels: i and j, ``[2, E]``, in the order of a coalesced matrix; None in the dense form.
        both: rows on which both are positive.
        observed: rows on which both are observed.
        first: rows on which i is positive, and j observed.
        second: rows on which j is positive, and i observed.
    """

    labels: Tensor | None
    both: Tensor
    observed: Tensor
    first: Tensor
    second: Tensor


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is given; all else there is 0."""
    return upper + upper.triu(1).T


def _lift(pairs: _Pairs) -> Tensor:
    # In fp64 throughout: products of counts may exceed int64.
    return (pairs.both.double() * pairs.observed) / (pairs.first.double() * pairs.second)
