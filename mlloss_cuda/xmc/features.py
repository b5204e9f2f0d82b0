"""From the numbers in a data file to the numbers that a model is fed with."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from mlloss_cuda.xmc.data import Dataset, DenseArray, FloatArray, IntArray, row_chunks

TREATMENTS = ("auto", "tfidf", "standardize", "raw")

DENSE_SHARE = 0.25
"""Above this share of entries, features are taken for measurements, not for counts of words."""

SMALLEST_DEVIATION = 1e-6
"""Of a feature, relative to its size: what deviates less is constant but for rounding."""


@dataclasses.dataclass(frozen=True)
class FeatureTransform:
    """Scales features by what was learned from the training rows; every row gets length 1.

    * `tfidf`: log(1 + value) * (log((1 + N) / (1 + n_j)) + 1), n_j = rows with feature j.
    * `standardize`: (value - mean_j) / deviation_j. Missing entries count as zeros and become
      entries, so this is for features of which most are present.
    * `raw`: the values as they are.

    Dense features are standardized or raw. They stay as they are in memory or in a file: it is
    `DenseEncoder` that applies scale and shift, to a batch at a time.
    """

    treatment: str
    scale: FloatArray  # [num_features]
    shift: FloatArray  # [num_features]
    is_dense: bool = False

    @staticmethod
    def fit(dataset: Dataset, treatment: str = "auto") -> FeatureTransform:
        """Learn the transform. `auto` takes `standardize` for features that are dense or mostly
        present, `raw` for sparse ones with negative values, and `tfidf` for everything else.
        """
        if treatment not in TREATMENTS:
            raise ValueError(f"treatment must be one of {TREATMENTS}, got {treatment!r}")
        if dataset.dense_features is not None:
            return _fit_dense(dataset.dense_features, treatment)
        rows, columns = max(dataset.num_rows, 1), dataset.num_features
        negative = bool(np.any(dataset.feature_values < 0))
        if treatment == "auto":
            share = len(dataset.feature_ids) / max(rows * columns, 1)
            treatment = "tfidf" if not negative else "raw"
            if share > DENSE_SHARE:
                treatment = "standardize"
        if treatment == "tfidf" and negative:
            raise ValueError("tfidf needs values that are not negative; use standardize or raw")

        scale = np.ones(columns, np.float32)
        shift = np.zeros(columns, np.float32)
        if treatment == "tfidf":
            present = np.bincount(
                dataset.feature_ids, weights=dataset.feature_values > 0, minlength=columns
            )
            scale = (np.log((1 + rows) / (1 + present)) + 1).astype(np.float32)
        elif treatment == "standardize":
            values = dataset.feature_values.astype(np.float64)
            mean = np.bincount(dataset.feature_ids, values, columns) / rows
            square = np.bincount(dataset.feature_ids, values**2, columns) / rows
            scale = _scale_of(np.sqrt(np.maximum(square - mean**2, 0)), np.sqrt(square))
            shift = mean.astype(np.float32)
        return FeatureTransform(treatment, scale, shift)

    def apply(self, dataset: Dataset) -> Dataset:
        """The data set with transformed features; dense ones are left to the model.

        Raises:
            ValueError: the features are dense, and those of the training rows were not, or the
                other way round.
        """
        is_dense = dataset.dense_features is not None
        if is_dense != self.is_dense:
            kinds = {True: "dense", False: "sparse"}
            raise ValueError(
                f"the features are {kinds[is_dense]}, those of the training rows were "
                f"{kinds[self.is_dense]}"
            )
        if is_dense:
            return dataset
        ids, offsets = dataset.feature_ids, dataset.feature_offsets
        values = dataset.feature_values
        if self.treatment == "standardize":
            ids, values, offsets = self._filled(dataset)
            values = (values - self.shift[ids]) * self.scale[ids]
        elif self.treatment == "tfidf":
            values = np.log1p(np.maximum(values, 0)) * self.scale[ids]
        return dataclasses.replace(
            dataset,
            feature_ids=ids,
            feature_values=_unit_rows(values, offsets),
            feature_offsets=offsets,
        )

    @staticmethod
    def _filled(dataset: Dataset) -> tuple[IntArray, FloatArray, IntArray]:
        """The features with an entry for every zero."""
        rows, columns = dataset.num_rows, dataset.num_features
        dense = np.zeros((rows, columns), np.float32)
        row = np.repeat(np.arange(rows), np.diff(dataset.feature_offsets))
        dense[row, dataset.feature_ids] = dataset.feature_values
        ids = np.tile(np.arange(columns), rows)
        return ids, dense.reshape(-1), np.arange(rows + 1) * columns


def _fit_dense(features: DenseArray, treatment: str) -> FeatureTransform:
    if treatment == "tfidf":
        raise ValueError("tfidf is for sparse features; use standardize or raw")
    columns = features.shape[1]
    scale, shift = np.ones(columns, np.float32), np.zeros(columns, np.float32)
    if treatment == "raw":
        return FeatureTransform("raw", scale, shift, is_dense=True)
    # Two passes: squares of deviations from the mean keep their digits, however far it is from 0.
    mean, square = np.zeros(columns), np.zeros(columns)
    for _, rows in row_chunks(features):
        mean += rows.sum(0, dtype=np.float64) / len(features)
    for _, rows in row_chunks(features):
        square += np.square(rows - mean).sum(0) / len(features)
    deviation = np.sqrt(square)
    scale = _scale_of(deviation, np.hypot(deviation, mean))
    return FeatureTransform("standardize", scale, mean.astype(np.float32), is_dense=True)


def _scale_of(deviation: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> FloatArray:
    """1 / deviation, or 0 for a feature that is constant, or too small for that number to fit."""
    constant = (deviation <= SMALLEST_DEVIATION * size) | (deviation < np.finfo(np.float32).tiny)
    return np.where(constant, 0, 1 / np.where(constant, 1, deviation)).astype(np.float32)


def _unit_rows(values: FloatArray, offsets: IntArray) -> FloatArray:
    rows = len(offsets) - 1
    row = np.repeat(np.arange(rows), np.diff(offsets))
    norm = np.sqrt(np.bincount(row, values.astype(np.float64) ** 2, rows))
    norm[norm == 0] = 1
    return (values / norm[row]).astype(np.float32)
