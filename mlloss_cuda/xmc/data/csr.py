"""Rows of sparse entries as CSR arrays, from whatever people have; no files here.

What is wrong with an argument raises ValueError or TypeError with a text that starts with its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
DenseArray = npt.NDArray[np.floating[Any]]  # [N, D], float16, float32 or float64

LARGEST_ID = 2**31 - 2
"""Ids and sizes stay below 2^31, so that every count fits the int32 indices of other tools."""

SIZE_LIMIT = 2**31
"""Sizes that a user chooses stay below this too: arithmetic on them then fits int64."""

VALUE_LIMIT = float(2**128 - 2**103)
"""From here on, numbers round to infinity in float32."""

DENSE_DTYPES = (np.float16, np.float32, np.float64)
_CHUNK_ELEMENTS = 1 << 20  # of dense matrices, looked at together: more would leave the cache


class CSR(NamedTuple):
    """Row `i` has the entries from `offsets[i]` to `offsets[i + 1]`."""

    ids: IntArray  # [entries], ascending and without duplicates in a row
    values: FloatArray  # [entries]
    offsets: IntArray  # [N + 1]
    num_columns: int

    def non_zero(self) -> CSR:
        """The entries that are not 0."""
        present = self.values != 0
        if present.all():
            return self
        offsets = offsets_of(present)[self.offsets]
        return CSR(self.ids[present], self.values[present], offsets, self.num_columns)


def offsets_of(counts: npt.NDArray[Any]) -> IntArray:
    """CSR offsets [N + 1] of rows with that many entries [N]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def gather_rows(offsets: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Positions of the entries of the given CSR rows, and the offsets of the gathered rows."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    new_offsets = offsets_of(lengths)
    entries = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], lengths)
    return entries, new_offsets


def row_chunks(matrix: DenseArray) -> Iterator[tuple[int, DenseArray]]:
    """Some rows of a dense matrix after the other, each with the number of its first row."""
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield start, matrix[start : start + step]


def check_dense(matrix: DenseArray, name: str) -> None:
    """Raise ValueError if a matrix cannot be dense features; reads all of it."""
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(
            f"{name} must be [N, D] with at least one column, got {list(matrix.shape)}"
        )
    if matrix.dtype.type not in DENSE_DTYPES or not matrix.dtype.isnative:
        raise ValueError(
            f"{name} must be float16, float32 or float64 in this machine's byte order, "
            f"got {matrix.dtype.str}"
        )
    _check_shape(matrix.shape, name)
    for start, rows in row_chunks(matrix):
        if not _fits_float32(rows):
            good = np.all(np.abs(rows.astype(np.float64)) < VALUE_LIMIT, axis=1)
            row = start + int(np.argmin(good))
            raise ValueError(
                f"{name} must be finite and within the range of float32, row {row} (from 0) is not"
            )


def _fits_float32(rows: DenseArray) -> bool:
    """Whether all numbers are finite, in float32 too."""
    if rows.dtype == np.float16:
        # By the bits without the sign, which are in the order of the numbers, with infinity and NaN
        # at the end: 90 times as fast as comparing the numbers.
        return int((rows.view(np.uint16) & 0x7FFF).max()) < 0x7C00
    with np.errstate(invalid="ignore"):  # NaN, which fails both comparisons
        return float(rows.min()) > -VALUE_LIMIT and float(rows.max()) < VALUE_LIMIT


def from_csr_arrays(
    ids: npt.NDArray[Any],
    values: npt.NDArray[Any],
    offsets: npt.NDArray[Any],
    shape: tuple[int, int],
    name: str,
) -> CSR:
    """Check CSR arrays that come from elsewhere; the entries of a row may be in any order.

    Raises:
        ValueError: they are not a matrix, hold a column twice in a row, or a value is not finite.
    """
    _check_shape(shape, name)
    for what, array in (("indices", ids), ("indptr", offsets)):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integers as {what}, found {array.dtype}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers as data, found {values.dtype}")
    if ids.ndim != 1 or values.shape != ids.shape or offsets.shape != (shape[0] + 1,):
        raise ValueError(
            f"{name}: expected data and indices of one length and indptr of {shape[0] + 1}, found "
            f"{list(values.shape)}, {list(ids.shape)} and {list(offsets.shape)}"
        )
    if offsets[0] != 0 or offsets[-1] != len(ids) or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"{name}: expected indptr to rise from 0 to {len(ids)}")
    if len(ids) and (ids.min() < 0 or ids.max() >= shape[1]):
        raise ValueError(
            f"{name}: expected indices from 0 to {shape[1] - 1}, found {ids.min()} to {ids.max()}"
        )
    with np.errstate(over="ignore"):  # the next check finds it
        values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected data that is finite and within the range of float32")
    ids, offsets = np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(offsets, np.int64)
    ids, values = _sorted_in_rows(ids, values, offsets, name)
    return CSR(ids, values, offsets, shape[1])


def features_from(features: Any) -> CSR | DenseArray:
    """Features as people have them: see `Dataset.from_arrays`."""
    if hasattr(features, "tocsr"):
        return _from_scipy(features, "features")
    if not isinstance(features, np.ndarray):
        raise TypeError(
            "features must be a scipy sparse matrix or a NumPy array, "
            f"got {type(features).__name__}"
        )
    if features.dtype.kind in "biu":
        features = features.astype(np.float32)
    check_dense(features, "features")
    return features


def labels_from(labels: Any, num_labels: int | None) -> CSR:
    """Labels as people have them: see `Dataset.from_arrays`. All values are 1."""
    if num_labels is not None:
        if isinstance(num_labels, bool) or not isinstance(num_labels, (int, np.integer)):
            raise TypeError(f"num_labels must be an integer, got {type(num_labels).__name__}")
        if not 0 <= num_labels <= LARGEST_ID:
            raise ValueError(f"num_labels must be in [0, {LARGEST_ID}], got {num_labels}")
        num_labels = int(num_labels)
    if hasattr(labels, "tocsr"):
        csr = labels_of(_from_scipy(labels, "labels"), "labels")
    elif isinstance(labels, np.ndarray):
        csr = _from_indicators(labels)
    elif isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)):
        return _from_lists(labels, num_labels)
    else:
        raise TypeError(
            "labels must be a scipy sparse matrix, a NumPy array or a list of lists of ids, "
            f"got {type(labels).__name__}"
        )
    if num_labels is not None and num_labels != csr.num_columns:
        raise ValueError(f"num_labels is {num_labels}, but labels has {csr.num_columns} columns")
    return csr


def labels_of(csr: CSR, name: str) -> CSR:
    """Entries above 0 as labels: all values are 1.

    Raises:
        ValueError: an entry is negative.
    """
    if csr.values.min(initial=0) < 0:
        raise ValueError(f"{name}: expected values that are not negative")
    csr = csr.non_zero()
    return csr._replace(values=_ones(len(csr.ids)))


def _ones(size: int) -> FloatArray:
    return np.broadcast_to(np.float32(1), size)  # takes no memory


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if max(shape) > LARGEST_ID:
        raise ValueError(f"{name}: expected sizes up to {LARGEST_ID}, found {list(shape)}")


def _from_scipy(matrix: Any, name: str) -> CSR:
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix [N, columns], got {list(matrix.shape)}")
    matrix = matrix.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()  # tocsr returns a CSR matrix itself
        matrix.sum_duplicates()
    return from_csr_arrays(matrix.indices, matrix.data, matrix.indptr, matrix.shape, name)


def _sorted_in_rows(
    ids: IntArray, values: FloatArray, offsets: IntArray, name: str
) -> tuple[IntArray, FloatArray]:
    """Entries by ascending id within each row."""
    if not _ascend_in_rows(ids, offsets):
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        order = np.lexsort((ids, rows))
        ids, values = ids[order], values[order]
        twice = np.flatnonzero((rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1]))
        if len(twice):
            raise ValueError(
                f"{name}: expected each column once in a row, found {ids[twice[0]]} twice in row "
                f"{rows[twice[0]]} (both from 0)"
            )
    return ids, values


def _ascend_in_rows(ids: IntArray, offsets: IntArray) -> bool:
    """Whether the ids of each row rise, found out with little memory."""
    falls = np.flatnonzero(ids[1:] <= ids[:-1]) + 1
    return bool(np.all(offsets[np.searchsorted(offsets, falls)] == falls))


def _from_indicators(labels: npt.NDArray[Any]) -> CSR:
    if labels.ndim != 2:
        raise ValueError(f"labels must be [N, L] if it is an array, got {list(labels.shape)}")
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"labels must hold 0 and 1 if it is an array, got {labels.dtype}")
    if not np.all((labels == 0) | (labels == 1)):
        raise ValueError(
            "labels must hold 0 and 1 if it is an array; ids of labels come as a list of lists"
        )
    _check_shape(labels.shape, "labels")
    rows, ids = np.nonzero(labels)
    offsets = offsets_of(np.bincount(rows, minlength=len(labels)))
    return CSR(ids, _ones(len(ids)), offsets, labels.shape[1])


def _from_lists(labels: Sequence[Any], num_labels: int | None) -> CSR:
    if any(isinstance(row, (str, bytes)) for row in labels):
        raise TypeError("labels must be lists of ids, got text")
    try:
        counts = np.array([len(row) for row in labels], np.int64)
        ids = np.array(list(itertools.chain.from_iterable(labels)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"labels must be a list of lists of ids: {error}") from error
    if len(ids) == 0:
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"labels must be lists of integers, got {ids.dtype}")
    limit = LARGEST_ID + 1 if num_labels is None else num_labels
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        raise ValueError(
            f"labels must be ids from 0 to {limit - 1}, got {ids.min()} to {ids.max()}"
        )
    ids, offsets = unique_in_rows(ids.astype(np.int64), offsets_of(counts))
    size = int(ids.max(initial=-1)) + 1 if num_labels is None else num_labels
    return CSR(ids, _ones(len(ids)), offsets, size)


def unique_in_rows(ids: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """The ids of each row ascending and without duplicates, and their offsets."""
    if not _ascend_in_rows(ids, offsets):
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        order = np.lexsort((ids, rows))
        ids = ids[order]
        keep = np.ones(len(ids), bool)
        keep[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
        ids, offsets = ids[keep], offsets_of(keep)[offsets]
    return ids, offsets
