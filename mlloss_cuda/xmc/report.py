"""What a training run leaves behind: a JSON report and a table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlloss_cuda import __version__, build_info
from mlloss_cuda.metrics import frequency_groups
from mlloss_cuda.xmc.classifier import GROUPS, REPORTED_RANKS, Classifier
from mlloss_cuda.xmc.data import Dataset, atomic_file

SCORES = tuple(f"{name}@{k}" for name in ("P", "PSP") for k in REPORTED_RANKS)


def make_report(
    classifier: Classifier, train: Dataset, test: Dataset, scores: Mapping[str, float]
) -> dict[str, Any]:
    """Everything worth keeping of a run, ready for JSON.

    Scores are percentages, times are seconds. A score that is not defined, such as PSP@k on rows
    that have no labels at all, is null.
    """
    return {
        **_summary(classifier, scores),
        "sizes": {
            "train_rows": train.num_rows,
            "test_rows": test.num_rows,
            "features": train.num_features,
            "labels": train.num_labels,
            "train_labels_per_row": round(len(train.label_ids) / max(train.num_rows, 1), 4),
            "train_rows_without_labels": train.rows_without_labels,
            "test_rows_without_labels": test.rows_without_labels,
        },
        "data": {
            "train": train.path,
            "test": test.path,
            "first_feature_id": train.first_feature_id,
            "first_label_id": train.first_label_id,
        },
        **_details(classifier),
    }


def make_evaluation_report(
    classifier: Classifier,
    test: Dataset,
    scores: Mapping[str, float],
    *,
    model: str | os.PathLike[str],
    exclude: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The report of a saved model on other rows: that of a run, less what the model does not know.

    Args:
        classifier: the model.
        test: the rows.
        scores: of the model on them.
        model: the file that it comes from.
        exclude: the file of pairs that did not count.
    """
    return {
        **_summary(classifier, scores),
        "sizes": {
            "train_rows": classifier.train_rows,
            "test_rows": test.num_rows,
            "features": classifier.num_features,
            "labels": classifier.num_labels,
            "test_rows_without_labels": test.rows_without_labels,
        },
        "data": {
            "model": os.fspath(model),
            "test": test.path,
            **({} if exclude is None else {"filter": os.fspath(exclude)}),
        },
        **_details(classifier),
    }


def _summary(classifier: Classifier, scores: Mapping[str, float]) -> dict[str, Any]:
    settings = classifier.settings
    rows = classifier.train_rows * len(classifier.history)
    return {
        "loss": settings.loss,
        **without_nan(scores),
        "train_seconds": round(classifier.train_seconds, 3),
        "rows_per_second": round(rows / max(classifier.train_seconds, 1e-9), 1),
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "feature_treatment": classifier.transform.treatment,
        "parameters": classifier.model.num_parameters,
    }


def _details(classifier: Classifier) -> dict[str, Any]:
    return {
        "label_frequency": label_frequency(classifier.label_counts),
        "epochs": [
            {
                "member": epoch.member,
                "epoch": epoch.epoch,
                "loss": epoch.loss,
                "learning_rate": epoch.learning_rate,  # of its last step
                "seconds": round(epoch.seconds, 3),
                **({} if epoch.scores is None else without_nan(epoch.scores)),
            }
            for epoch in classifier.history
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "mlloss_cuda": __version__,
            "build": build_info(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
    }


def label_frequency(counts: Tensor) -> dict[str, Any]:
    """How often labels occur in the training rows.

    Args:
        counts: ``[num_labels]``, in how many training rows each label is.

    Returns:
        `never_seen`: the number of labels without any row; `groups`: of head, torso and tail, see
        `metrics.frequency_groups`, the labels and the fewest and most rows that one of them has
        (null without labels); `histogram`: labels of each group with 0 rows, 1 row, 2 to 3, 4 to 7
        and so on.

    >>> label_frequency(torch.tensor([5, 0, 1]))["histogram"][0]
    {'rows': [0, 0], 'labels': {'head': 0, 'torso': 0, 'tail': 1}}
    """
    counts = counts.cpu()
    groups = frequency_groups(counts, len(GROUPS))
    bins = torch.frexp(counts.double()).exponent.clamp(min=0).long()  # [2^(b-1), 2^b) is bin b
    own = [counts[groups == group] for group in range(len(GROUPS))]
    num_bins = int(bins.max()) + 1 if len(bins) else 1
    histogram = [
        torch.bincount(bins[groups == group], minlength=num_bins).tolist()
        for group in range(len(GROUPS))
    ]
    return {
        "never_seen": int((counts == 0).sum()),
        "groups": {
            name: {
                "labels": len(rows),
                "fewest_rows": int(rows.min()) if len(rows) else None,
                "most_rows": int(rows.max()) if len(rows) else None,
            }
            for name, rows in zip(GROUPS, own, strict=True)
        },
        "histogram": [
            {
                "rows": [2**bin // 2, max(2**bin - 1, 0)],
                "labels": {
                    name: labels[bin] for name, labels in zip(GROUPS, histogram, strict=True)
                },
            }
            for bin in range(num_bins)
        ],
    }


def write_report(path: str | os.PathLike[str], report: object) -> None:
    """Write JSON. The file appears under its name only when it is complete."""
    text = json.dumps(report, indent=2, allow_nan=False)
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def score_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """One line per run: the loss, the scores, seconds and rows per second of training."""
    rows = [
        [
            report["loss"],
            *("-" if report[name] is None else f"{report[name]:.2f}" for name in SCORES),
            f"{report['train_seconds']:.1f}",
            f"{report['rows_per_second']:,.0f}",
        ]
        for report in reports
    ]
    return format_table(["loss", *SCORES, "train s", "rows/s"], rows)


def evaluation_table(scores: Mapping[str, float]) -> str:
    """One line per metric, one column per k."""
    lines: dict[str, list[str]] = {}
    for name, score in scores.items():
        metric, _, rest = name.partition("@")
        _, _, group = rest.partition(" ")
        text = "-" if math.isnan(score) else f"{score:.2f}"
        lines.setdefault(f"{metric} {group}".strip(), []).append(text)
    rows = [[name, *values] for name, values in lines.items()]
    return format_table(["", *(f"@{k}" for k in REPORTED_RANKS)], rows)


def write_predictions(
    path: str | os.PathLike[str], classifier: Classifier, scores: Tensor, labels: Tensor
) -> None:
    """Write labels and scores [N, k] as text. The file appears only when it is complete."""
    first = classifier.first_label_id
    with atomic_file(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        if first == 0:
            file.write(f"{len(labels)} {classifier.num_labels}\n")
        for ids, values in zip(labels.tolist(), scores.tolist(), strict=True):
            pairs = zip(ids, values, strict=True)
            file.write(" ".join(f"{id + first}:{value:.6g}" for id, value in pairs) + "\n")


def without_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores for JSON, which has no NaN."""
    return {name: None if math.isnan(score) else score for name, score in scores.items()}
