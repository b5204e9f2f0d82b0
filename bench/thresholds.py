"""What thresholds per label do for F1, on real data.

    MLLOSS_DATA=folder python bench/thresholds.py

A model is trained on 80 % of the training rows, thresholds are fitted to a tenth of them and judged
on the last tenth; test rows are not looked at.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch

from mlloss_cuda.metrics import F1Score
from mlloss_cuda.thresholds import ScoreHistogram, fit_f1
from mlloss_cuda.xmc import Classifier, Dataset, Settings, fit, read_dataset

AVERAGES = ("micro", "macro", "samples")
SHRINKAGES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def parts(dataset: Dataset) -> list[Dataset]:
    """80 %, 10 % and 10 % of the rows."""
    order = np.random.default_rng(0).permutation(dataset.num_rows)
    bounds = [0, len(order) // 10, len(order) // 5, len(order)]
    cut = [order[a:b] for a, b in itertools.pairwise(bounds)]
    return [dataset.take(np.sort(rows)) for rows in reversed(cut)]


def histogram_of(classifier: Classifier, rows: Dataset, as_one: bool) -> ScoreHistogram:
    histogram = ScoreHistogram(1 if as_one else rows.num_labels)
    for logits, labels in classifier.logits(rows):
        if as_one:
            histogram.update(logits.reshape(-1, 1), labels.to_dense(rows.num_labels).reshape(-1, 1))
        else:
            histogram.update(logits, labels)
    return histogram


def scores(classifier: Classifier, rows: Dataset, threshold: torch.Tensor | float) -> list[float]:
    metrics = [
        F1Score(average, num_labels=rows.num_labels, threshold=threshold) for average in AVERAGES
    ]
    for logits, labels in classifier.logits(rows):
        for metric in metrics:
            metric.update(logits, labels)
    return [100 * metric.compute().item() for metric in metrics]


def main() -> None:
    folder = os.environ.get("MLLOSS_DATA")
    if not folder:
        sys.exit("MLLOSS_DATA is not set; it names a folder with bibtex/bibtex_train.txt etc.")
    print(f"{'':34}" + "".join(f"{average:>9}" for average in AVERAGES))
    for name in ("bibtex", "delicious"):
        train, held_out, judged = parts(read_dataset(Path(folder) / name / f"{name}_train.txt"))
        for loss in ("sigmoid", "zlpr"):
            classifier = fit(train, Settings(loss=loss), progress=False)
            one = fit_f1(histogram_of(classifier, held_out, as_one=True))
            histogram = histogram_of(classifier, held_out, as_one=False)
            rows: list[tuple[str, torch.Tensor | float]] = [
                ("0", 0.0),
                (f"one for all labels, {one.item():g}", one.item()),
                *((f"shrinkage {s:g}", fit_f1(histogram, shrinkage=s)) for s in SHRINKAGES),
            ]
            for what, threshold in rows:
                found = scores(classifier, judged, threshold)
                line = f"{name} {loss} {what}"
                print(f"{line:34}" + "".join(f"{value:9.2f}" for value in found), flush=True)


if __name__ == "__main__":
    main()
