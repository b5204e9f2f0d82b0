"""Metrics of multi-label and extreme multi-label classification, fed batch by batch.

The state of a metric has k numbers, or a few per label, whatever the number of rows. Metrics that
have seen other rows can be merged, within a process (``merge``) and over processes
(``all_reduce``). :mod:`mlloss_cuda.metrics.torchmetrics` makes torchmetrics of them.

**At k** (:class:`PrecisionAtK`, :class:`RecallAtK`, :class:`NDCGAtK`, :class:`HitAtK`,
:class:`PropensityScoredPrecisionAtK`, :class:`PropensityScoredNDCGAtK`, :class:`CoverageAtK`,
:class:`MacroF1AtK`, :class:`GroupedPrecisionAtK`): from the best labels of each row, as ids or
scores. Rows without labels count as rows on which nothing was right, as in pyxclib;
``rows_without_labels='skip'`` leaves them out.

**Decisions** (:class:`F1Score`, :class:`HammingLoss`, :class:`SubsetAccuracy`): from scores and
thresholds, or from the labels that were decided on.

**Label shards**: the best labels of all shards are those of :func:`mlloss_cuda.merge_top_labels`.
Micro-F1 and Hamming loss over shards are merged as over batches, macro-F1 is the mean over the
labels of all shards, and the counts of rows that ``'samples'`` and :class:`SubsetAccuracy` need are
added up before ``update_counts``.
"""

from ..weights import inverse_propensity
from .decisions import Decisions, F1Score, HammingLoss, SubsetAccuracy
from .ranking import (
    AtK,
    CoverageAtK,
    GroupedPrecisionAtK,
    HitAtK,
    MacroF1AtK,
    MeanOverRowsAtK,
    NDCGAtK,
    PrecisionAtK,
    PropensityScoredNDCGAtK,
    PropensityScoredPrecisionAtK,
    RecallAtK,
    frequency_groups,
    labels_of_pairs,
)
from .streaming import Metric

__all__ = [
    "AtK",
    "CoverageAtK",
    "Decisions",
    "F1Score",
    "GroupedPrecisionAtK",
    "HammingLoss",
    "HitAtK",
    "MacroF1AtK",
    "MeanOverRowsAtK",
    "Metric",
    "NDCGAtK",
    "PrecisionAtK",
    "PropensityScoredNDCGAtK",
    "PropensityScoredPrecisionAtK",
    "RecallAtK",
    "SubsetAccuracy",
    "frequency_groups",
    "inverse_propensity",
    "labels_of_pairs",
]
