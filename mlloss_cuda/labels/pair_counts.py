"""Exact counts for pairs of labels, dense or sparse.

A pair (i, j), i <= j, has the key i * C + j. There are one or more counts for each pair, the
columns. Where a whole matrix is stored, what lies below its diagonal is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .entries import Entries, blocks

# Pairs that are listed together. Each takes about a hundred bytes on the way.
_PAIRS = 1 << 20
# Keys of sparse counts that may wait until they are sorted in with the others.
_WAITING = 1 << 20
# Elements of the dense rows that a matrix product takes.
_PRODUCT = 1 << 22
# Multiply-adds of a matrix product that take as long as one pair in a list, and rows whose product
# takes as long as adding its result to the counts. Measured on two CPU cores, C = 512 and 4096.
_PAIR_COST, _ADDING_COST = 200, 20


class DensePairs:
    """Counts of all pairs: int64 ``[columns, C, C]``."""

    def __init__(self, num_labels: int, columns: int, device: torch.device) -> None:
        # Outside of inference mode, where it could not be changed later.
        with torch.inference_mode(False):
            self.counts = torch.zeros(
                columns, num_labels, num_labels, dtype=torch.int64, device=device
            )

    def add(self, keys: Tensor, counts: Tensor) -> None:
        """Add `counts` ``[columns, T]`` to the pairs `keys` ``[T]``, which may repeat."""
        for own, new in zip(self.counts, counts, strict=True):
            own.view(-1).index_add_(0, keys, new)

    def add_matrices(self, *counts: Tensor) -> None:
        """Add one matrix ``[C, C]`` to each column; what lies below the diagonal is left out."""
        for own, new in zip(self.counts, counts, strict=True):
            own += new.triu().to(torch.int64)

    def merge(self, other: DensePairs) -> None:
        """Add what another one has counted."""
        self.counts += other.counts.to(self.counts.device)


class SparsePairs:
    """Counts of the pairs that occur.

    What is added waits until there is half as much of it as of keys that are sorted: so each pair
    is sorted a few times, into however many batches the rows are cut.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(columns, 0, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._num_waiting = 0

    def add(self, keys: Tensor, counts: Tensor) -> None:
        """Add `counts` ``[columns, T]`` to the pairs `keys` ``[T]``, which may repeat."""
        self._waiting.append((keys, counts))
        self._num_waiting += keys.shape[0]
        if self._num_waiting > max(_WAITING, self._keys.shape[0] // 2):
            self.table()

    def merge(self, other: SparsePairs) -> None:
        """Add what another one has counted."""
        keys, counts = other.table()
        self.add(keys.to(self._keys.device), counts.to(self._keys.device))

    def table(self) -> tuple[Tensor, Tensor]:
        """Return the keys that occur, sorted, ``[P]``, and their counts ``[columns, P]``."""
        if self._waiting:
            keys, counts = zip((self._keys, self._counts), *self._waiting, strict=True)
            self._waiting, self._num_waiting = [], 0
            self._keys, self._counts = _summed(torch.cat(keys), torch.cat(counts, dim=1))
        return self._keys, self._counts

    def at(self, wanted: Tensor) -> Tensor:
        """Return the counts of the pairs `wanted` ``[E]``: ``[columns, E]``."""
        keys, counts = self.table()
        if keys.shape[0] == 0:
            return counts.new_zeros(counts.shape[0], wanted.shape[0])
        places = torch.searchsorted(keys, wanted).clamp(max=keys.shape[0] - 1)
        return torch.where(keys[places] == wanted, counts[:, places], 0)


def _summed(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sort keys and add up the counts of equal ones."""
    keys, order = keys.sort()
    is_last = torch.ones_like(keys, dtype=torch.bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    # Sums up to the last of equal keys, less those up to the one before.
    sums = counts[:, order].cumsum(1)[:, is_last]
    return keys[is_last], torch.diff(sums, dim=1, prepend=sums.new_zeros(sums.shape[0], 1))


def count_pairs(
    entries: Entries,
    num_rows: int,
    num_labels: int,
    positive: DensePairs | SparsePairs,
    observed: DensePairs | SparsePairs | None,
) -> None:
    """Count the pairs of labels of each row.

    Args:
        entries: of `num_rows` rows.
        num_rows: how many.
        num_labels: C.
        positive: one column: both labels are positive.
        observed: three columns, for entries with missing labels: both labels are observed; the
            first is positive besides; the second is.
    """
    position = torch.arange(entries.rows.shape[0], device=entries.rows.device)
    # With itself and with each later one of its row.
    partners = torch.searchsorted(entries.rows, entries.rows, right=True) - position
    until = partners.cumsum(0)
    if isinstance(positive, DensePairs):
        assert not isinstance(observed, SparsePairs)
        num_pairs = int(until[-1]) if until.shape[0] > 0 else 0
        if num_pairs * _PAIR_COST > (num_rows + _ADDING_COST) * num_labels**2:
            _multiply(entries, num_rows, num_labels, positive, observed)
            return
    for first, second in _pairs(partners, until):
        keys = entries.labels[first] * num_labels + entries.labels[second]
        if observed is None:
            positive.add(keys, torch.ones_like(keys)[None])
        else:
            assert entries.positive is not None
            first_is, second_is = entries.positive[first], entries.positive[second]
            both = keys[first_is & second_is]
            positive.add(both, torch.ones_like(both)[None])
            counts = [torch.ones_like(keys), first_is.long(), second_is.long()]
            observed.add(keys, torch.stack(counts))


def _pairs(partners: Tensor, until: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the positions of first and second entries of pairs.

    Entry p makes the pairs (p, p), (p, p + 1), ... (p, p + partners[p] - 1); `until` are the sums
    of the partners of the first entries.
    """
    for begin, end in blocks(until, _PAIRS):
        own = partners[begin:end]
        total = int(until[end - 1]) - (int(until[begin - 1]) if begin > 0 else 0)
        of_block = torch.arange(end - begin, device=own.device)
        of_block = torch.repeat_interleave(of_block, own, output_size=total)
        place = torch.arange(total, device=own.device)
        first_place = until[begin:end] - own - until[begin] + own[0]
        first = begin + of_block
        yield first, first + place - first_place[of_block]


def _multiply(
    entries: Entries,
    num_rows: int,
    num_labels: int,
    positive: DensePairs,
    observed: DensePairs | None,
) -> None:
    """Count pairs by matrix products: for rows with many labels."""
    # Sums of zeros and ones in fp32 are exact up to 2^24, which no product reaches: rows come a
    # block of entries or elements at a time.
    step = max(1, _PRODUCT // max(num_labels, 1))
    with torch.autocast(entries.rows.device.type, enabled=False):
        for begin in range(0, num_rows, step):
            rows = torch.arange(begin, min(begin + step, num_rows), device=entries.rows.device)
            bounds = torch.searchsorted(entries.rows, torch.stack([rows[0], rows[-1] + 1]))
            part = slice(int(bounds[0]), int(bounds[1]))
            own_rows, own_labels = entries.rows[part] - begin, entries.labels[part]
            ones = torch.zeros(len(rows), num_labels, dtype=torch.float32, device=rows.device)
            ones[own_rows, own_labels] = 1.0
            if observed is None:
                positive.add_matrices(ones.T @ ones)
                continue
            assert entries.positive is not None
            positives = torch.zeros_like(ones)
            positives[own_rows, own_labels] = entries.positive[part].to(ones.dtype)
            positive.add_matrices(positives.T @ positives)
            with_positive = ones.T @ positives
            observed.add_matrices(ones.T @ ones, with_positive.T, with_positive)
