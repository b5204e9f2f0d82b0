"""Features and labels of N rows in memory, or in memory-mapped files."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mlloss_cuda.xmc.data.csr import (
    CSR,
    DenseArray,
    FloatArray,
    IntArray,
    features_from,
    gather_rows,
    labels_from,
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Features and labels of N rows: both sparse, as two CSR structures, or with dense features.

    Row `i` has the features `feature_ids[a:b]` with the values `feature_values[a:b]`, where
    `a, b = feature_offsets[i], feature_offsets[i + 1]`, and the labels `label_ids[c:d]` likewise.
    The ids here start at 0; `first_feature_id` and `first_label_id` (0 or 1) are to be added to
    get the ids as they stand in the file. Labels are ascending and without duplicates in a row.

    With `dense_features`, row `i` has the features `dense_features[i]`, and there are no sparse
    ones: `feature_ids` and `feature_values` are empty and all `feature_offsets` are 0.

    The arrays are not to be written to: they may be memory-mapped files, or belong to the caller.
    """

    feature_ids: IntArray  # [number of feature entries]
    feature_values: FloatArray  # [number of feature entries]
    feature_offsets: IntArray  # [N + 1]
    label_ids: IntArray  # [number of label entries]
    label_offsets: IntArray  # [N + 1]
    num_features: int
    num_labels: int
    path: str = ""
    has_header: bool = True
    first_feature_id: int = 0
    first_label_id: int = 0
    dense_features: DenseArray | None = None  # [N, num_features], float16, float32 or float64

    @staticmethod
    def from_arrays(features: Any, labels: Any, *, num_labels: int | None = None) -> Dataset:
        """Make a data set of what is in memory.

        Args:
            features: [N, D]; a scipy sparse matrix of any format (duplicates are summed, as scipy
                does), whose entries become sparse features, or a NumPy array, which becomes dense
                features: float16, float32 and float64 are taken as they are, without a copy,
                integers and bool become float32. Finite, within the range of float32.
            labels: a scipy sparse matrix [N, L], where entries above 0 are labels; a NumPy array
                [N, L] of 0 and 1; or N lists of label ids from 0, where an id that is listed twice
                counts once.
            num_labels: L of a list of lists; the largest id + 1 if not given.

        Raises:
            TypeError: an argument is none of these.
            ValueError: sizes differ, or a value or an id is out of range.

        Example:
            >>> import numpy as np
            >>> data = Dataset.from_arrays(np.array([[0.5, 2.0], [1.0, 0.0]]), [[7, 3], []])
            >>> data.num_rows, data.num_features, data.num_labels
            (2, 2, 8)
            >>> data.label_ids.tolist(), data.label_offsets.tolist()
            ([3, 7], [0, 2, 2])
        """
        of_features, of_labels = features_from(features), labels_from(labels, num_labels)
        rows = len(of_labels.offsets) - 1
        found = len(of_features.offsets) - 1 if isinstance(of_features, CSR) else len(of_features)
        if found != rows:
            raise ValueError(f"features and labels must have the same rows, got {found} and {rows}")
        return from_parts(of_features, of_labels)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.label_offsets) - 1

    @property
    def rows_without_labels(self) -> int:
        """How many rows have no label."""
        return int(np.count_nonzero(np.diff(self.label_offsets) == 0))

    def label_counts(self) -> IntArray:
        """Rows per label, [num_labels]."""
        return np.bincount(self.label_ids, minlength=self.num_labels)

    def take(self, rows: IntArray) -> Dataset:
        """The data set that consists of the given rows, in the given order: a copy of them."""
        feature_entries, feature_offsets = gather_rows(self.feature_offsets, rows)
        label_entries, label_offsets = gather_rows(self.label_offsets, rows)
        dense = self.dense_features
        return dataclasses.replace(
            self,
            feature_ids=self.feature_ids[feature_entries],
            feature_values=self.feature_values[feature_entries],
            feature_offsets=feature_offsets,
            label_ids=self.label_ids[label_entries],
            label_offsets=label_offsets,
            dense_features=None if dense is None else dense[rows],
        )

    def hold_out(self, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """The other rows, and a share of the rows drawn at random, both in their order.

        Raises:
            ValueError: the share is not above 0 and below 1, or less than half a row.
        """
        if not 0 < share < 1:
            raise ValueError(f"the share to hold out must be above 0 and below 1, got {share}")
        count = round(share * self.num_rows)
        if count == 0:
            raise ValueError(
                f"{share} of {self.num_rows:,} rows is none to hold out"
                + (f" ({self.path})" if self.path else "")
            )
        order = np.random.default_rng(seed).permutation(self.num_rows)
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))


def from_parts(features: CSR | DenseArray | None, labels: CSR | None, path: str = "") -> Dataset:
    """Put checked features and labels together; None is a half without entries."""
    if isinstance(features, np.ndarray):
        rows = len(features)
    else:
        given = labels if features is None else features
        assert given is not None
        rows = len(given.offsets) - 1
    nothing = CSR(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(rows + 1, np.int64), 0)
    dense = features if isinstance(features, np.ndarray) else None
    sparse = features if isinstance(features, CSR) else nothing
    labels = nothing if labels is None else labels
    return Dataset(
        feature_ids=sparse.ids,
        feature_values=sparse.values,
        feature_offsets=sparse.offsets,
        label_ids=labels.ids,
        label_offsets=labels.offsets,
        num_features=sparse.num_columns if dense is None else dense.shape[1],
        num_labels=labels.num_columns,
        path=path,
        dense_features=dense,
    )
